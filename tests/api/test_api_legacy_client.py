"""``/v1/fine_tunes`` with the last client that knew it, which ``make test`` installs apart."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(__file__).parents[2] / ".venv" / "openai-0.28" / "bin" / "python"
SCRIPT = Path(__file__).with_name("legacy_client.py")

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="openai 0.28 is not installed")

Call = Callable[..., Any]


@pytest.fixture
def start(server: Any) -> Callable[..., subprocess.Popen[str]]:
    """Begins one call of the old client."""

    def start(*call: str) -> subprocess.Popen[str]:
        command = [str(PYTHON), "-I", str(SCRIPT), f"{server.url}/v1", *call]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def call(start: Callable[..., subprocess.Popen[str]]) -> Call:
    """What one call of the old client returns."""

    def call(*arguments: str) -> Any:
        process = start(*arguments)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return json.loads(out)

    return call


@pytest.fixture
def file_id(call: Call, tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    return str(call("upload", str(path))["id"])


def test_a_job_from_its_creation_to_its_model(
    server: Any, call: Call, start: Callable[..., subprocess.Popen[str]], file_id: str
) -> None:
    created = call("create", file_id)
    assert (created["object"], created["status"]) == ("fine-tune", "pending")
    assert created["hyperparams"]["n_epochs"] == 2
    assert [job["id"] for job in call("list")["data"]] == [created["id"]]

    following = start("follow", created["id"])
    server.store.succeed(created["id"], server.store.claim_next_job().adapter_path)
    out, _ = following.communicate(timeout=60)
    messages = [event["message"] for event in json.loads(out)]
    assert messages[0].startswith("Created")
    assert messages[-1] == "The job has successfully completed"
    assert [event["message"] for event in call("events", created["id"])["data"]] == messages

    done = call("retrieve", created["id"])
    assert done["status"] == "succeeded"
    deleted = call("delete model", done["fine_tuned_model"])
    assert (deleted["id"], deleted["deleted"]) == (done["fine_tuned_model"], True)


def test_a_job_is_cancelled(call: Call, file_id: str) -> None:
    assert call("cancel", call("create", file_id)["id"])["status"] == "cancelled"


def test_an_error_is_one_of_the_old_client_too(call: Call) -> None:
    found = call("error", "ft-none")
    assert (found["status"], found["code"]) == (404, None)
    assert "ft-none" in found["message"]


def test_the_newer_routes(call: Call, file_id: str) -> None:
    job = call("create job", file_id)
    assert (job["object"], job["status"]) == ("fine_tuning.job", "queued")
    assert [found["id"] for found in call("list jobs")["data"]] == [job["id"]]
    assert len(call("job events", job["id"])["data"]) == 1
