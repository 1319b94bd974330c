"""``/openapi.json`` against what the server answers, by schemathesis."""

import warnings
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from peft_adapters import save_random_adapter
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from flexllm_vllm.jobs import MergeSpec, WeightedAdapter

Upload = Callable[..., str]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture
def schema(server: Any) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.fixture
def job_ids(server: Any, client: openai.OpenAI, upload: Upload) -> list[str]:
    """A job of each outcome, with events and a checkpoint, so that lists hold something."""
    file_id = upload()
    create = client.fine_tuning.jobs.create
    ids = [create(model="demo", training_file=file_id, suffix="a").id for _ in range(4)]
    store = server.store
    job = store.claim_next_job()
    store.record_progress(job.id, 1, job.total_steps, 7)
    store.record_step(job.id, 1, {"train_loss": float("nan")})
    store.record_checkpoint(job.id, 1, job.folder, {"step": 1, "train_loss": 0.5})
    store.succeed(job.id, job.adapter_path)
    store.fail(store.claim_next_job().id, "nan_loss", "The loss is not a number")
    store.request_pause(ids[2])
    store.claim_next_job()
    return ids


def test_no_request_breaks_the_server_or_the_description(schema: Any, job_ids: list[str]) -> None:
    ours = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        ours += 1

        @given(case=operation.as_strategy())
        @settings(
            max_examples=8,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            case.validate_response(case.call(), checks=CHECKS)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    assert ours >= 40


def test_the_objects_are_as_described(
    server: Any, client: openai.OpenAI, schema: Any, job_ids: list[str]
) -> None:
    file_id = client.files.list().data[0].id

    def check(method: str, template: str, status: int = 200, **ids: str) -> None:
        answer = httpx.request(method, server.url + template.format(**ids))
        assert answer.status_code == status, answer.text
        operation = schema[template][method]
        assert operation.is_valid_response(answer), answer.text
        operation.validate_response(answer)

    for template in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/fine_tunes"):
        check("GET", template)
    check("GET", "/v1/finetuning/iterations")
    for job_id in job_ids:
        for below in ("", "/events", "/checkpoints"):
            check("GET", "/v1/fine_tuning/jobs/{job_id}" + below, job_id=job_id)
        for below in ("", "/events"):
            check("GET", "/v1/fine_tunes/{job_id}" + below, job_id=job_id)
    finished, _, paused, running = job_ids
    for action in ("pause", "resume", "cancel"):
        check("POST", "/v1/fine_tuning/jobs/{job_id}/" + action, job_id=running)
    check("POST", "/v1/fine_tuning/jobs/{job_id}/pause", 400, job_id=finished)
    check("POST", "/v1/fine_tunes/{job_id}/cancel", job_id=paused)
    check("GET", "/v1/files/{file_id}", file_id=file_id)
    check("DELETE", "/v1/files/{file_id}", 409, file_id=file_id)


def test_adapters_merges_models_and_webhooks_are_as_described(server: Any, schema: Any) -> None:
    def check(method: str, template: str, body: Any = None, **ids: str) -> dict[str, Any]:
        answer = httpx.request(method, server.url + template.format(**ids), json=body)
        assert answer.status_code == 200, answer.text
        schema[template][method].validate_response(answer)
        found: dict[str, Any] = answer.json()
        return found

    store, adapters = server.store, "/v1/finetuning/adapters"
    names = [f"ft:demo:local::{id}" for id in ("aaaa", "bbbb", "cccc", "dddd")]
    folders = [store.adapters_folder / name[-4:] for name in names]
    for seed, (name, folder) in enumerate(zip(names, folders, strict=True)):
        store.adapters.add(name, save_random_adapter(folder, seed), "demo", "import")
    spec = MergeSpec(tuple(WeightedAdapter(name, 0.5) for name in names[:2]), "linear")
    for i in range(2):  # of a base model that this server does not serve: they are left to us
        store.merges.create(f"ftmerge-{i}", f"ft:other:local::{i}", "other", spec)
    store.merges.fail(store.merges.claim(models=("other",)), "merge_failed", "No")
    assert store.merges.succeed(store.merges.claim(models=("other",)), folders[0])
    merge = {"adapters": [{"name": name} for name in names[:2]], "method": "linear"}
    ids = ["ftmerge-0", "ftmerge-1", check("POST", f"{adapters}/merge", merge)["id"]]
    for merge_id in ids:
        check("GET", f"{adapters}/merges/{{merge_id}}", merge_id=merge_id)
    for template in (adapters, f"{adapters}/merges"):
        assert len(check("GET", template)["data"]) >= 3
    check("GET", f"{adapters}/{{name}}", name=names[0])
    check("GET", "/v1/models/{name}", name=names[0])
    check("DELETE", "/v1/models/{name}", name=names[2])
    check("DELETE", f"{adapters}/{{name}}", name=names[3])

    hooks = "/v1/webhook_endpoints"
    body = {"name": "x", "url": "https://1.1.1.1/", "event_types": ["fine_tuning.job.failed"]}
    one = {"webhook_endpoint_id": check("POST", hooks, body)["id"]}
    assert check("GET", hooks)["data"]
    check("GET", f"{hooks}/{{webhook_endpoint_id}}", **one)
    check("POST", f"{hooks}/{{webhook_endpoint_id}}", {"name": "y"}, **one)
    check("POST", f"{hooks}/{{webhook_endpoint_id}}/rotate_secret", **one)
    check("DELETE", f"{hooks}/{{webhook_endpoint_id}}", **one)
    check("GET", "/v1/webhook_event_types")


def test_an_answer_that_is_not_as_described_is_found(schema: Any, server: Any) -> None:
    answer = httpx.get(f"{server.url}/v1/files")
    operation = schema["/v1/fine_tuning/jobs/{job_id}"]["GET"]
    assert not operation.is_valid_response(answer)


def test_the_description_is_complete(server: Any) -> None:
    description = httpx.get(f"{server.url}/openapi.json").json()
    assert "HTTPValidationError" not in description["components"]["schemas"]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            assert operation["description"], where
            assert operation["security"] == [{"HTTPBearer": []}], where
            responses = operation["responses"]
            assert {"4XX", "5XX"} <= set(responses), where
            if "Graders" in operation["description"] or "projects" in operation["description"]:
                continue
            for media, content in responses["200"]["content"].items():
                assert content["schema"], where
                if media == "application/json":
                    assert "$ref" in content["schema"], where
