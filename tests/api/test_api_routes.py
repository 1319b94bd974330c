"""docs/routes.md against the openai client, and against what the server answers."""

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai._resource import SyncAPIResource
from starlette.routing import Match

DOCUMENT = Path(__file__).parents[2] / "docs" / "routes.md"
RESOURCES = ("files", "uploads", "fine_tuning", "models", "webhooks")

# A value for each parameter that the client demands.
ARGUMENTS: dict[str, Any] = {
    "bytes": 10,
    "data": b"x",
    "event_type": "fine_tuning.job.succeeded",
    "event_types": ["fine_tuning.job.succeeded"],
    "file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'),
    "file_id": "file-none",
    "filename": "a.jsonl",
    "fine_tuned_model_checkpoint": "ft:org/demo:local::x:ckpt-step-1",
    "fine_tuning_job_id": "ftjob-none",
    "grader": {"type": "string_check", "name": "a", "input": "a", "reference": "a"},
    "mime_type": "text/jsonl",
    "model": "ft:org/demo:local::none",
    "model_sample": "x",
    "name": "x",
    "part_ids": ["part-none"],
    "permission_id": "cp_none",
    "project_ids": ["proj_none"],
    "purpose": "fine-tune",
    "training_file": "file-none",
    "upload_id": "upload_none",
    "url": "https://example.com/hook",
    "webhook_endpoint_id": "we_none",
}


@dataclass(frozen=True)
class Row:
    method: str
    request: str
    answer: str


def rows() -> list[Row]:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return [Row(*(cell.strip(" `") for cell in line.strip("|").split("|"))) for line in lines]


def methods_of(resource: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All that can be called on a resource of the client and on those below it."""
    for attribute in dir(type(resource)):
        if attribute.startswith(("_", "with_")) or hasattr(SyncAPIResource, attribute):
            continue
        if inspect.isfunction(getattr(type(resource), attribute)):
            yield f"{name}.{attribute}", getattr(resource, attribute)
        elif isinstance(below := getattr(resource, attribute), SyncAPIResource):
            yield from methods_of(below, f"{name}.{attribute}")


def client_methods(client: openai.OpenAI) -> dict[str, Any]:
    return {
        name: method
        for resource in RESOURCES
        for name, method in methods_of(getattr(client, resource), resource)
    }


def test_every_method_of_the_client_is_in_the_table(client: openai.OpenAI) -> None:
    listed = [row.method for row in rows()]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(client_methods(client))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.method)
def test_a_method_answers_as_the_table_says(server: Any, row: Row) -> None:
    seen: list[Any] = []
    http = openai.DefaultHttpxClient(event_hooks={"response": [seen.append]})
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http
    )
    method = client_methods(client)[row.method]
    verb, _, template = row.request.partition(" ")
    if not template.startswith("/"):
        assert row.answer == "supported"  # within the client, or by other methods of the table
        return
    required = [
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    with warnings.catch_warnings(), contextlib.suppress(openai.APIStatusError), client:
        warnings.simplefilter("ignore", DeprecationWarning)
        method(**{name: ARGUMENTS[name] for name in required})

    response = seen[0]
    path = response.request.url.path
    pattern = re.sub(r"\{\w+\}", ".+", template)
    assert (response.request.method, bool(re.fullmatch(pattern, path))) == (verb, True)
    _skip_without_routes(server.app, path)
    if response.status_code >= 400:
        response.read()
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    if row.answer == "supported":
        scope = {"type": "http", "method": verb, "path": path, "headers": []}
        assert any(route.matches(scope)[0] is Match.FULL for route in server.app.routes)
        assert response.status_code < 500
    else:
        status, code = row.answer.split(" `")
        assert response.status_code == int(status)
        assert response.json()["error"]["code"] == code


def _skip_without_routes(app: Any, path: str) -> None:
    prefix = "/".join(path.split("/")[:3])
    if not any(getattr(route, "path", "").startswith(prefix) for route in app.routes):
        pytest.skip(f"no route below {prefix} yet")


def test_reinforcement_fine_tuning_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(
            model="demo",
            training_file="file-none",
            method={"type": "reinforcement", "reinforcement": {"grader": ARGUMENTS["grader"]}},
        )
    assert caught.value.param == "method.type"
