import json
from pathlib import Path
from typing import Any

import openai


def test_a_file_is_uploaded_shown_listed_and_deleted(
    run: Any, client: openai.OpenAI, train: Path
) -> None:
    result = run("files", "upload", train)
    file_id = result.out.strip()
    assert (result.exit_code, result.err) == (0, "")
    assert client.files.content(file_id).read() == train.read_bytes()
    shown = dict(line.split(maxsplit=1) for line in run("files", "show", file_id).out.splitlines())
    assert (shown["id"], shown["name"], shown["status"]) == (file_id, "train.jsonl", "processed")
    assert shown["bytes"] == str(train.stat().st_size)
    other = json.loads(run("files", "upload", train, "--json").out)["id"]
    page = json.loads(run("files", "list", "--json").out)
    assert [file["id"] for file in page["data"]] == [other, file_id]
    page = json.loads(run("files", "list", "--limit", 1, "--json").out)
    assert ([file["id"] for file in page["data"]], page["has_more"]) == ([other], True)
    assert json.loads(run("files", "list", "--purpose", "batch", "--json").out)["data"] == []
    assert run("files", "list").out.splitlines()[2].split()[:2] == [file_id, "train.jsonl"]
    assert run("files", "delete", file_id).out == f"{file_id} deleted\n"
    assert json.loads(run("files", "delete", other, "--json").out)["deleted"]
    assert list(client.files.list()) == []


def test_a_bad_line_is_named(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = run("files", "upload", path)
    assert (result.exit_code, result.out) == (1, "")
    assert "line 2" in result.err.lower()
    assert "(parameter: file)" in result.err


def test_a_file_in_use_stays(run: Any, create: Any, client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.retrieve(create())
    result = run("files", "delete", job.training_file)
    assert result.exit_code == 1
    assert job.id in result.err


def test_another_purpose_is_refused_by_the_server(run: Any, train: Path) -> None:
    result = run("files", "upload", train, "--purpose", "batch")
    assert result.exit_code == 1
    assert "(parameter: purpose)" in result.err
