from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types import FileDeleted, FileObject

Upload = Callable[..., str]
LINE = b'{"prompt": "a", "completion": "b"}\n'


def create(client: openai.OpenAI, content: bytes, **options: Any) -> FileObject:
    return client.files.create(file=("data.jsonl", content), **{"purpose": "fine-tune", **options})


def test_a_file_lives_as_at_openai(client: openai.OpenAI) -> None:
    file = create(client, LINE)
    FileObject.model_validate(file.model_dump(), strict=True)
    assert (file.bytes, file.filename, file.status) == (len(LINE), "data.jsonl", "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == LINE
    assert [f.id for f in client.files.list()] == [file.id]
    deleted = client.files.delete(file.id)
    assert deleted == FileDeleted(id=file.id, object="file", deleted=True)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_lists_have_pages(client: openai.OpenAI) -> None:
    ids = [create(client, LINE).id for _ in range(5)]
    assert [f.id for f in client.files.list(limit=2)] == ids[::-1]
    assert [f.id for f in client.files.list(limit=2, order="asc")] == ids
    assert list(client.files.list(purpose="batch")) == []


@pytest.mark.parametrize("method", ["retrieve", "content", "delete"])
def test_an_unknown_file_is_not_found(client: openai.OpenAI, method: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        getattr(client.files, method)("file-none")
    assert caught.value.type == "invalid_request_error"
    assert "file-none" in caught.value.message


def test_a_malformed_line_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Line 2: not valid JSON") as caught:
        create(client, LINE + b'{"prompt": \n')
    assert caught.value.param == "file"
    assert list(client.files.list()) == []


def test_an_empty_file_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="empty"):
        create(client, b"")


def test_another_purpose_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, LINE, purpose="batch")
    assert caught.value.param == "purpose"


def test_a_field_that_would_be_ignored_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        create(client, LINE, expires_after={"anchor": "created_at", "seconds": 3600})


def test_a_large_file_is_refused(server: Any, client: openai.OpenAI) -> None:
    server.service.max_file_bytes = 100_000
    create(client, LINE * 1000)
    for factor in (3000, 6000):  # found once the form is read, and before
        with pytest.raises(openai.APIStatusError, match="limit of 100000 bytes") as caught:
            create(client, LINE * factor)
        assert caught.value.status_code == 413


def test_a_form_that_is_none_is_refused(server: Any) -> None:
    url = f"{server.url}/v1/files"
    answers = [
        httpx.post(url, json={"file": "x"}),
        httpx.post(url, content=b"x", headers={"content-type": "multipart/form-data"}),
        httpx.post(url, data={"purpose": "fine-tune"}),
        httpx.post(url, files={"file": ("a", LINE)}),
        httpx.post(url, files={"file": ("a", LINE)}, data={"purpose": "fine-tune", "x": "y"}),
        httpx.get(url, params={"limit": "many"}),
        httpx.get(url, params={"after": "file-none"}),
    ]
    for answer in answers:
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


def test_a_file_in_use_stays(client: openai.OpenAI, upload: Upload) -> None:
    file_id = upload()
    job = client.fine_tuning.jobs.create(model="demo", training_file=file_id)
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(file_id)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file_id).deleted
