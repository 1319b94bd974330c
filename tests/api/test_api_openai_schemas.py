"""Our objects against OpenAI's published description. Beside these tests, every answer that the
stock client gets in this folder is (``Server.client`` in conftest.py)."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from peft_adapters import save_random_adapter
from vllm_application import vllm_application

from flexllm_vllm.api.limits import Limits
from flexllm_vllm.api.responses import upload_object
from flexllm_vllm.api.tracker_access import TrackerAccess
from flexllm_vllm.jobs import JobStatus, rows
from tests.api.openai_description import DIFFERENCES, check, faults, operations, schema_of
from tests.api.test_api_states import bring_to

Ask = Callable[..., Any]
Upload = Callable[..., str]
ADAPTER = "ft:org/demo:local:orders:aB3dE5gH"
DOCUMENT = Path(__file__).parents[2] / "docs" / "migrate-from-openai.md"
PREFERENCE = {
    "input": {"messages": [{"role": "user", "content": "Hi"}]},
    "preferred_output": [{"role": "assistant", "content": "Hello"}],
    "non_preferred_output": [{"role": "assistant", "content": "No"}],
}
WANDB = {"type": "wandb", "wandb": {"project": "orders"}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment_name": "orders"}}


@pytest.fixture
def ask(server: Any) -> Ask:
    """Ask the server; the answer is as described, and the description knows the question."""

    def ask(method: str, path: str, status: int = 200, **options: Any) -> Any:
        answer = httpx.request(method, f"{server.url}/v1{path}", **options)
        assert answer.status_code == status, answer.text
        assert schema_of(answer) is not None, path
        check(answer)
        return answer.json()

    return ask


@pytest.fixture
def trackers(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any tracker can be asked for, and none is run."""
    monkeypatch.setattr(TrackerAccess, "problem", lambda self, kind: None)
    monkeypatch.setattr(server.store.trackers, "claim", lambda *_, **__: [])


def content(*lines: bytes) -> dict[str, Any]:
    return {"file": ("a.jsonl", b"\n".join(lines))}


LINE = b'{"prompt": "a", "completion": "b"}'


def test_every_operation_that_is_described(server: Any, ask: Ask) -> None:
    """Once each, and with it whatever a list holds then."""
    seen: set[tuple[str, str]] = set()

    def called(method: str, template: str, status: int = 200, **options: Any) -> Any:
        seen.add((method.lower(), template))
        ids = {name: options.pop(name) for name in re.findall(r"{(\w+)}", template)}
        return ask(method, template.format(**ids), status, **options)

    for path in ("/files", "/fine_tuning/jobs", "/models"):  # while there is nothing
        called("GET", path)
    file = called("POST", "/files", files=content(LINE), data={"purpose": "fine-tune"})
    called("GET", "/files/{file_id}", file_id=file["id"])
    called("GET", "/files")

    body = {"model": "demo", "training_file": file["id"]}
    job = called("POST", "/fine_tuning/jobs", json=body)
    of_job = {"fine_tuning_job_id": job["id"]}
    called("POST", "/fine_tuning/jobs/{fine_tuning_job_id}/pause", **of_job)
    called("POST", "/fine_tuning/jobs/{fine_tuning_job_id}/resume", **of_job)
    called("GET", "/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", **of_job)
    claimed = server.store.claim_next_job()
    server.store.record_checkpoint(
        job["id"], 1, claimed.folder / "1", {"step": 1, "train_loss": float("nan")}
    )
    found = called("GET", "/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", **of_job)
    assert found["data"][0]["metrics"] == {"step": 1}
    called("GET", "/fine_tuning/jobs/{fine_tuning_job_id}/events", **of_job)
    called("POST", "/fine_tuning/jobs/{fine_tuning_job_id}/cancel", **of_job)
    server.store.cancelled(job["id"])
    called("GET", "/fine_tuning/jobs/{fine_tuning_job_id}", **of_job)
    called("GET", "/fine_tuning/jobs")
    called("DELETE", "/files/{file_id}", file_id=file["id"])

    folder = save_random_adapter(server.store.adapters_folder / "a", 1)
    server.store.adapters.add(ADAPTER, folder, "demo", "import")
    for name in ("demo", "alias", "static", ADAPTER.replace("/", "%2F")):
        called("GET", "/models/{model}", model=name)
    assert ADAPTER in [model["id"] for model in called("GET", "/models")["data"]]
    called("DELETE", "/models/{model}", model=ADAPTER.replace("/", "%2F"))

    announced = {"filename": "a", "bytes": len(LINE), "purpose": "fine-tune", "mime_type": "a/b"}
    upload = {"upload_id": called("POST", "/uploads", json=announced)["id"]}
    part = called("POST", "/uploads/{upload_id}/parts", files={"data": LINE}, **upload)["id"]
    called("POST", "/uploads/{upload_id}/complete", json={"part_ids": [part]}, **upload)
    upload = {"upload_id": called("POST", "/uploads", json=announced)["id"]}
    called("POST", "/uploads/{upload_id}/cancel", **upload)

    # What this server has not: errors in OpenAI's form. And no JSON, but the file itself.
    permissions = "/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions"
    of_checkpoint = {"fine_tuned_model_checkpoint": "ft:demo:local::a:ckpt-step-1"}
    called("GET", permissions, 400, **of_checkpoint)
    called("POST", permissions, 400, json={"project_ids": ["a"]}, **of_checkpoint)
    called("DELETE", permissions + "/{permission_id}", 400, permission_id="cp-1", **of_checkpoint)
    assert operations() - seen == {("get", "/files/{file_id}/content")}


@pytest.mark.parametrize("method", ["supervised", "dpo"])
@pytest.mark.parametrize("state", list(JobStatus))
def test_a_job_in_each_state(
    server: Any, ask: Ask, upload: Upload, trackers: None, state: JobStatus, method: str
) -> None:
    lines = [PREFERENCE] if method == "dpo" else []
    training_file, validation_file = upload(*lines), upload(*lines)
    hyperparameters = {"n_epochs": 2, "learning_rate_multiplier": 0.5}
    body = {
        "model": "demo",
        "training_file": training_file,
        "validation_file": validation_file,
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        "suffix": "orders",
        "metadata": {"team": "shop"},
        "integrations": [WANDB],
        "seed": 7,
    }
    job = ask("POST", "/fine_tuning/jobs", json=body)
    bring_to(server.store, job["id"], state.value)
    path = f"/fine_tuning/jobs/{job['id']}"
    shown = ask("GET", path)
    assert (shown["status"], shown["method"]["type"]) == (state.value, method)
    assert shown["integrations"] == [WANDB]
    assert (shown["error"] is not None) == (state is JobStatus.FAILED)
    assert ask("GET", "/fine_tuning/jobs")["data"] == [shown]
    ask("GET", path + "/events")
    # The least that a request can say.
    ask("POST", "/fine_tuning/jobs", json={"model": "demo", "training_file": upload()})


def test_events_of_both_types(server: Any, ask: Ask, upload: Upload) -> None:
    job = ask("POST", "/fine_tuning/jobs", json={"model": "demo", "training_file": upload()})
    server.store.claim_next_job()
    server.store.record_step(job["id"], 1, {"train_loss": float("nan")})
    server.store.record_evaluation(job["id"], 1, {"valid_loss": 1.5})
    for level in ("info", "warn", "error"):
        server.store.add_event(job["id"], level, "A message")
    events = ask("GET", f"/fine_tuning/jobs/{job['id']}/events?limit=100")["data"]
    assert {event["type"] for event in events} == {"message", "metrics"}
    assert {event["level"] for event in events} == {"info", "warn", "error"}
    assert {bool(event["data"]) for event in events if event["type"] == "message"} == {False}


def test_files_of_each_purpose(server: Any, ask: Ask) -> None:
    expiring = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    expiry: dict[str, str]
    for expiry in ({}, expiring):
        file = ask("POST", "/files", files=content(LINE), data={"purpose": "fine-tune", **expiry})
        assert ("expires_at" in file) == bool(expiry)
    job = ask("POST", "/fine_tuning/jobs", json={"model": "demo", "training_file": file["id"]})
    table = server.store.files.create(io.BytesIO(b"step\n1\n"), "a.csv", "fine-tune-results")
    server.store.succeed(job["id"], server.store.claim_next_job().adapter_path, table.id)
    (results,) = ask("GET", f"/fine_tuning/jobs/{job['id']}")["result_files"]
    assert ask("GET", f"/files/{results}")["purpose"] == "fine-tune-results"
    assert len(ask("GET", "/files")["data"]) == 3


def test_an_upload_in_each_state(server: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = {"filename": "a", "bytes": len(LINE), "purpose": "fine-tune", "mime_type": "a/b"}
    pending, cancelled, completed, expired = (
        ask("POST", "/uploads", json=announced)["id"] for _ in range(4)
    )
    ask("POST", f"/uploads/{cancelled}/cancel")
    part = ask("POST", f"/uploads/{completed}/parts", files={"data": LINE})["id"]
    file = ask("POST", f"/uploads/{completed}/complete", json={"part_ids": [part]})["file"]
    assert file["status"] == "processed"
    states = {}
    for upload in (pending, cancelled, completed):
        shown = upload_object(server.store.uploads.get(upload))
        assert faults(shown, "Upload") == []
        states[upload] = shown["status"]
    assert list(states.values()) == ["pending", "cancelled", "completed"]
    # No operation answers with it, but it is an Upload nevertheless.
    monkeypatch.setattr(rows, "now", lambda: 1 << 40)
    shown = upload_object(server.store.uploads.get(expired))
    assert (shown["status"], faults(shown, "Upload")) == ("expired", [])


def test_errors_of_each_kind(server: Any, ask: Ask, upload: Upload, tmp_path: Path) -> None:
    body = {"model": "demo", "training_file": (file_id := upload())}
    load, server.service.load_tokenizer = server.service.load_tokenizer, lambda: 1 / 0
    ask("POST", "/fine_tuning/jobs", 500, json=body)
    server.service.load_tokenizer = load
    ask("POST", "/fine_tuning/jobs", json=body)
    purpose = {"purpose": "fine-tune"}
    ask("POST", "/fine_tuning/jobs", 400, json={})
    ask("POST", "/fine_tuning/jobs", 400, content=b"{")
    ask("GET", "/files?limit=0", 400)
    ask("POST", "/files", 400, files=content(b"{}"), data=purpose)
    ask("DELETE", "/models/demo", 403)
    for path in ("/files/none", "/fine_tuning/jobs/none", "/models/none", "/files/a/b/c"):
        ask("GET", path, 404)
    for path in ("/files", "/models/demo"):
        ask("PUT", path, 405)
    ask("DELETE", f"/files/{file_id}", 409)
    server.service.limits = Limits(max_file_bytes=8)
    ask("POST", "/files", 413, files=content(LINE), data=purpose)
    server.service.limits = Limits(max_files=1)
    ask("POST", "/files", 429, files=content(LINE), data=purpose)
    server.service.limits = Limits(max_disk_bytes=1)
    ask("POST", "/files", 507, files=content(LINE), data=purpose)


def test_a_missing_key(tmp_path: Path, serve: Callable[..., str]) -> None:
    url = serve(vllm_application(tmp_path / "store", ["--api-key", "sk-a"]))
    for path in ("files", "fine_tuning/jobs", "models/demo"):
        for headers in ({}, {"Authorization": "Bearer sk-b"}):
            answer = httpx.get(f"{url}/v1/{path}", headers=headers)
            assert answer.status_code == 401
            check(answer)


def test_what_is_not_as_described_is_found() -> None:
    assert faults({"error": {"message": "a", "type": "b", "param": None, "code": 401}}, "Error")
    file = {"id": "file-a", "object": "file", "bytes": 1, "created_at": 1, "filename": "a"}
    file |= {"purpose": "fine-tune", "status": "processed"}
    assert faults(file, "OpenAIFile") == []
    assert faults({**file, "expires_at": None}, "OpenAIFile")
    request = httpx.Request("POST", "http://a/v1/uploads/upload_a/cancel")
    with pytest.raises(pytest.fail.Exception, match="'status' is a required property"):
        check(httpx.Response(200, json={"id": "upload_a"}, request=request))


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_one(
    server: Any, client: openai.OpenAI, upload: Upload, trackers: None, difference: str
) -> None:
    """Without it the answer is not as described, with it alone it is."""
    settings: dict[str, dict[str, Any]] = {
        "status": {},
        "hyperparameters": {"hyperparameters": {"n_epochs": 51, "batch_size": 257}},
        "integrations": {"integrations": [MLFLOW]},
    }
    body = {"model": "demo", "training_file": upload(), **settings[difference]}
    job = httpx.post(f"{server.url}/v1/fine_tuning/jobs", json=body).json()
    if difference == "status":
        job = client.fine_tuning.jobs.pause(job["id"]).to_dict()
    assert faults(job, "FineTuningJob", frozenset(DIFFERENCES) - {difference})
    assert faults(job, "FineTuningJob", frozenset({difference})) == []


def test_every_difference_is_documented() -> None:
    section = DOCUMENT.read_text().partition("published description\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(DIFFERENCES)
