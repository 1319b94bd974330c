import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROUTE = "/v1/finetuning/adapters/{name}/content"


@pytest.fixture
def adapter(server: Any, create: Callable[..., str]) -> tuple[str, str]:
    """A job that has succeeded, and the name of its adapter."""
    job_id = create(suffix="orders")
    job = server.store.claim_next_job()
    job.adapter_path.mkdir()
    (job.adapter_path / CONFIG).write_text('{"r": 8}')
    (job.adapter_path / WEIGHTS).write_bytes(b"weights" * 1000)
    server.store.succeed(job_id, job.adapter_path)
    return job_id, f"ft:demo:local:orders:{job_id[6:14]}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_adapters_are_listed_and_deleted(run: Any, adapter: tuple[str, str]) -> None:
    _, name = adapter
    page = json.loads(run("adapters", "list", "--json").out)
    assert [model["id"] for model in page["data"]] == [name]
    assert run("adapters", "list").out.splitlines()[1].split()[:2] == [name, "demo"]
    assert run("adapters", "delete", name).out == f"{name} deleted\n"
    assert json.loads(run("adapters", "list", "--json").out)["data"] == []


def test_an_adapter_is_exported_by_its_name_and_by_its_job(
    run: Any, adapter: tuple[str, str], tmp_path: Path
) -> None:
    job_id, name = adapter
    expected = {CONFIG: b'{"r": 8}', WEIGHTS: b"weights" * 1000}
    folder = tmp_path / "new" / "folder"
    result = run("jobs", "export", job_id, folder)
    assert (result.exit_code, result.err) == (0, "")
    assert result.out.splitlines() == [str(folder / CONFIG), str(folder / WEIGHTS)]
    assert contents(folder) == expected
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run("adapters", "export", name, empty, "--json")
    assert json.loads(result.out)["adapter"] == name
    assert contents(empty) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty", "store"}


def test_a_folder_that_is_not_empty_is_written_only_by_force(
    run: Any, adapter: tuple[str, str], tmp_path: Path
) -> None:
    _, name = adapter
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    outside = tmp_path / "outside"
    outside.write_text("outside")
    (folder / CONFIG).symlink_to(outside)
    result = run("adapters", "export", name, folder)
    assert result.exit_code == 2
    assert "--force" in result.err
    assert not (folder / WEIGHTS).exists()
    assert run("adapters", "export", name, folder, "--force").exit_code == 0
    assert contents(folder).keys() == {"notes", CONFIG, WEIGHTS}
    assert (folder / "notes").read_text() == "mine"
    assert outside.read_text() == "outside"  # the link is replaced, not followed
    assert run("adapters", "export", name, outside, "--force").exit_code == 2


def test_what_has_no_adapter_is_not_exported(
    run: Any, create: Callable[..., str], tmp_path: Path
) -> None:
    result = run("jobs", "export", create(), tmp_path / "new")
    assert result.exit_code == 1
    assert "it is queued" in result.err
    assert run("adapters", "export", "ft:none", tmp_path / "new").exit_code == 1
    assert not (tmp_path / "new").exists()


def entry(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def archive(*entries: tarfile.TarInfo, names: tuple[str, ...] = (CONFIG, WEIGHTS)) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for info in (*(entry(name, size=2) for name in names), *entries):
            tar.addfile(info, io.BytesIO(b"{}") if info.size else None)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(entry("../evil", size=2)), "'../evil'"),
        (archive(entry("/absolute", size=2)), "'/absolute'"),
        (archive(entry("..", type=tarfile.DIRTYPE)), "'..'"),
        (archive(entry("a/b", size=2)), "'a/b'"),
        (archive(entry("a\\b", size=2)), "is no plain file"),
        (archive(entry("link", type=tarfile.SYMTYPE, linkname="/etc")), "'link'"),
        (archive(entry("link", type=tarfile.LNKTYPE, linkname=CONFIG)), "'link'"),
        (archive(entry("pipe", type=tarfile.FIFOTYPE)), "'pipe'"),
        (archive(entry(CONFIG, size=2)), "twice"),
        (archive(*(entry(f"{n}", size=2) for n in range(100))), "more than"),
        (archive(names=(CONFIG,)), f"no {WEIGHTS}"),
        (archive()[:-20], "no whole tar.gz"),
        (b"nothing", "no whole tar.gz"),
        (b"", "no whole tar.gz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_archive_that_is_not_plain_leaves_nothing_behind(
    run: Any, serve: Callable[[FastAPI], str], tmp_path: Path, content: bytes, message: str
) -> None:
    app = FastAPI()

    @app.get(ROUTE)
    def send(name: str) -> Response:
        assert name == "ft:a"
        return Response(content, media_type="application/gzip")

    before = {path.name for path in tmp_path.iterdir()}
    url = f"{serve(app)}/v1"
    result = run("adapters", "export", "ft:a", tmp_path / "target", "--base-url", url)
    assert result.exit_code == 1
    assert message in result.err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_top_folder_itself_may_be_an_entry(
    run: Any, serve: Callable[[FastAPI], str], tmp_path: Path
) -> None:
    app = FastAPI()
    content = archive(entry(".", type=tarfile.DIRTYPE), names=(f"./{CONFIG}", f"./{WEIGHTS}"))

    @app.get(ROUTE)
    def send(name: str) -> Response:
        return Response(content, media_type="application/gzip")

    url = f"{serve(app)}/v1"
    assert run("adapters", "export", "ft:a", tmp_path / "new", "--base-url", url).exit_code == 0
    assert contents(tmp_path / "new") == {CONFIG: b"{}", WEIGHTS: b"{}"}


def test_a_download_that_breaks_off_leaves_nothing_behind(
    run: Any, serve: Callable[[FastAPI], str], tmp_path: Path
) -> None:
    app = FastAPI()
    content = archive()

    @app.get(ROUTE)
    def send(name: str) -> Response:
        length = {"content-length": str(len(content))}
        return StreamingResponse(iter([content[:50]]), headers=length)

    url = f"{serve(app)}/v1"
    result = run("adapters", "export", "ft:a", tmp_path / "new", "--base-url", url)
    assert result.exit_code == 5
    assert not (tmp_path / "new").exists()
