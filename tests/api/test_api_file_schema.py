"""What ``/openapi.json`` says of files and uploads, against what they answer."""

from typing import Any

import httpx
import jsonschema
import openai
import pytest

LINE = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def described(server: Any) -> dict[str, Any]:
    return httpx.get(f"{server.url}/openapi.json").json()


def check(described: dict[str, Any], route: str, method: str, answer: httpx.Response) -> None:
    """Whether an answer is what the description promises."""
    responses = described["paths"][route][method]["responses"]
    found = responses.get(str(answer.status_code)) or responses[f"{answer.status_code // 100}XX"]
    schema = found["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json(), {**schema, "components": described["components"]})


def test_forms_are_described(described: dict[str, Any]) -> None:
    for path, field in (("/v1/files", "file"), ("/v1/uploads/{upload_id}/parts", "data")):
        body = described["paths"][path]["post"]["requestBody"]
        form = body["content"]["multipart/form-data"]["schema"]
        assert form["properties"][field] == {"type": "string", "format": "binary"}
        assert field in form["required"]


def test_files_answer_as_described(
    server: Any, client: openai.OpenAI, described: dict[str, Any]
) -> None:
    url = f"{server.url}/v1/files"
    created = httpx.post(url, files={"file": ("a", LINE)}, data={"purpose": "fine-tune"})
    one = f"{url}/{created.json()['id']}"
    check(described, "/v1/files", "post", created)
    check(described, "/v1/files", "post", httpx.post(url))
    check(described, "/v1/files", "get", httpx.get(url))
    check(described, "/v1/files/{file_id}", "get", httpx.get(one))
    check(described, "/v1/files/{file_id}", "delete", httpx.delete(one))
    check(described, "/v1/files/{file_id}", "get", httpx.get(one))


def test_uploads_answer_as_described(server: Any, described: dict[str, Any]) -> None:
    url = f"{server.url}/v1/uploads"
    values = {"filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    created = httpx.post(url, json={**values, "bytes": len(LINE)})
    one = f"{url}/{created.json()['id']}"
    part = httpx.post(f"{one}/parts", files={"data": LINE})
    complete = httpx.post(f"{one}/complete", json={"part_ids": [part.json()["id"]]})
    assert complete.json()["status"] == "completed"
    check(described, "/v1/uploads", "post", created)
    check(described, "/v1/uploads", "post", httpx.post(url, json=values))
    check(described, "/v1/uploads/{upload_id}/parts", "post", part)
    check(described, "/v1/uploads/{upload_id}/complete", "post", complete)
    check(described, "/v1/uploads/{upload_id}/cancel", "post", httpx.post(f"{one}/cancel"))
    other = httpx.post(url, json={**values, "bytes": 1}).json()["id"]
    cancelled = httpx.post(f"{url}/{other}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    check(described, "/v1/uploads/{upload_id}/cancel", "post", cancelled)
