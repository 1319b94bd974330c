"""Files in parts, with the stock client."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Upload
from openai.types.uploads import UploadPart

from flexllm_vllm.api import limits
from flexllm_vllm.api.limits import Limits

LINE = b'{"prompt": "a", "completion": "b"}\n'


def create(client: openai.OpenAI, num_bytes: int, **options: Any) -> Upload:
    values = {"filename": "data.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
    return client.uploads.create(**{**values, "bytes": num_bytes, **options})


def contents(server: Any, folder: str) -> list[str]:
    return [path.name for path in (server.store.root / folder).iterdir()]


def test_parts_become_a_file(client: openai.OpenAI, server: Any) -> None:
    content = LINE * 3
    upload = create(client, len(content))
    Upload.model_validate(upload.model_dump(), strict=True)
    assert (upload.status, upload.file, upload.bytes) == ("pending", None, len(content))
    assert upload.id.startswith("upload_")
    assert upload.expires_at == upload.created_at + 3600
    parts = [
        client.uploads.parts.create(upload.id, data=piece) for piece in (content[50:], content[:50])
    ]
    UploadPart.model_validate(parts[0].model_dump(), strict=True)
    assert (parts[0].upload_id, parts[0].object) == (upload.id, "upload.part")
    ids = [parts[1].id, parts[0].id]
    done = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(content).hexdigest())
    assert (done.id, done.status) == (upload.id, "completed")
    assert done.file is not None
    assert done.file == client.files.retrieve(done.file.id)
    assert client.files.content(done.file.id).read() == content
    assert client.files.wait_for_processing(done.file.id).status == "processed"
    assert client.fine_tuning.jobs.create(model="demo", training_file=done.file.id).id
    assert contents(server, "uploads") == []


def test_the_client_splits_a_file(client: openai.OpenAI, tmp_path: Path, server: Any) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(LINE * 1000)
    for given in ({"file": file}, {"file": LINE, "filename": "b.jsonl", "bytes": len(LINE)}):
        done = client.uploads.upload_file_chunked(
            **given, mime_type="application/jsonl", purpose="fine-tune", part_size=10_000
        )
        assert done.file is not None
        assert done.file.bytes == done.bytes
        assert done.file.filename == done.filename
    assert client.files.content(client.files.list().data[1].id).read() == file.read_bytes()
    assert contents(server, "uploads") == []


def test_parts_may_come_at_once(client: openai.OpenAI) -> None:
    pieces = [b'{"prompt": "%d", "completion": "b"}\n' % i for i in range(8)]
    upload = create(client, sum(map(len, pieces)))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda p: client.uploads.parts.create(upload.id, data=p), pieces))
    done = client.uploads.complete(upload.id, part_ids=[part.id for part in parts])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"".join(pieces)


def test_the_file_expires_as_was_asked(client: openai.OpenAI) -> None:
    upload = create(client, len(LINE), expires_after={"anchor": "created_at", "seconds": 7200})
    part = client.uploads.parts.create(upload.id, data=LINE)
    file = client.uploads.complete(upload.id, part_ids=[part.id]).file
    assert file is not None
    assert file.expires_at == file.created_at + 7200


def test_an_upload_that_was_cancelled_takes_nothing(client: openai.OpenAI, server: Any) -> None:
    upload = create(client, len(LINE))
    part = client.uploads.parts.create(upload.id, data=LINE)
    assert contents(server, "uploads") == [part.id]
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert contents(server, "uploads") == []
    refused_everywhere(client, upload.id, part.id, "cancelled")


def test_an_upload_that_is_complete_takes_nothing(client: openai.OpenAI) -> None:
    upload = create(client, len(LINE))
    part = client.uploads.parts.create(upload.id, data=LINE)
    client.uploads.complete(upload.id, part_ids=[part.id])
    refused_everywhere(client, upload.id, part.id, "completed")
    assert len(client.files.list().data) == 1


def test_an_upload_expires_after_an_hour(
    client: openai.OpenAI, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = create(client, len(LINE))
    part = client.uploads.parts.create(upload.id, data=LINE)
    monkeypatch.setattr(time, "time", lambda: float(upload.expires_at))
    refused_everywhere(client, upload.id, part.id, "expired")
    create(client, len(LINE))
    assert contents(server, "uploads") == []
    refused_everywhere(client, upload.id, part.id, "expired")


def refused_everywhere(client: openai.OpenAI, upload_id: str, part_id: str, status: str) -> None:
    uploads = client.uploads
    calls: list[Callable[[], Any]] = [
        lambda: uploads.parts.create(upload_id, data=LINE),
        lambda: uploads.complete(upload_id, part_ids=[part_id]),
        lambda: uploads.cancel(upload_id),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError, match=f"status '{status}'") as caught:
            call()
        assert caught.value.code == "invalid_upload_state"


def test_an_unknown_upload_is_not_found(client: openai.OpenAI) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.uploads.parts.create("upload_none", data=LINE),
        lambda: client.uploads.complete("upload_none", part_ids=["part_x"]),
        lambda: client.uploads.cancel("upload_none"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError, match="upload_none") as caught:
            call()
        assert caught.value.param == "upload_id"


def test_parts_must_make_the_file(client: openai.OpenAI, server: Any) -> None:
    upload = create(client, 2 * len(LINE))
    part = client.uploads.parts.create(upload.id, data=LINE)
    other = client.uploads.parts.create(upload.id, data=LINE)
    md5 = hashlib.md5(LINE).hexdigest()
    for part_ids, options, param in (
        ([part.id], {}, "part_ids"),
        ([part.id, part.id], {}, "part_ids"),
        ([part.id, "part_none"], {}, "part_ids"),
        ([], {}, "part_ids"),
        ([part.id, other.id], {"md5": md5}, "md5"),
        ([part.id, other.id], {"md5": "md5"}, "md5"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.complete(upload.id, part_ids=part_ids, **options)
        assert caught.value.param == param
    assert contents(server, "files") == []
    done = client.uploads.complete(upload.id, part_ids=[part.id, other.id])
    assert done.status == "completed"


def test_a_file_that_is_wrong_leaves_the_upload(client: openai.OpenAI, server: Any) -> None:
    content = LINE + b"{}\n"
    upload = create(client, len(content))
    part = client.uploads.parts.create(upload.id, data=content)
    with pytest.raises(openai.BadRequestError, match="Line 2"):
        client.uploads.complete(upload.id, part_ids=[part.id])
    assert (contents(server, "files"), contents(server, "uploads")) == ([], [part.id])
    assert client.uploads.cancel(upload.id).status == "cancelled"


@pytest.mark.parametrize(("options", "param"), [
    ({"bytes": 0}, "bytes"),
    ({"bytes": -1}, "bytes"),
    ({"purpose": "batch"}, "purpose"),
    ({"purpose": "fine-tune-results"}, "purpose"),
    ({"filename": "a" * 256}, "filename"),
    ({"filename": "a\nb"}, "filename"),
    ({"filename": ""}, "filename"),
    ({"mime_type": ""}, "mime_type"),
    ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds"),
    ({"extra_body": {"size": 5}}, "size"),
])  # fmt: skip
def test_a_wrong_upload_is_refused(client: openai.OpenAI, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **{"num_bytes": options.pop("bytes", 5), **options})
    assert caught.value.param == param


def test_half_a_character_is_refused(server: Any) -> None:
    body = b'{"bytes": 5, "filename": "a", "mime_type": "\\ud800", "purpose": "fine-tune"}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/uploads", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "mime_type")


def test_a_part_has_a_limit(
    client: openai.OpenAI, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limits.MAX_PART_BYTES == 64 * 1024 * 1024
    monkeypatch.setattr("flexllm_vllm.api.file_service.MAX_PART_BYTES", 200_000)
    upload = create(client, 10_000_000)
    client.uploads.parts.create(upload.id, data=b"x" * 200_000)
    for size in (200_001, 10_000_000):
        with pytest.raises(openai.APIStatusError, match="limit of 200000 bytes") as caught:
            client.uploads.parts.create(upload.id, data=b"x" * size)
        assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.uploads.parts.create(upload.id, data=b"")
    assert len(contents(server, "uploads")) == 1


def test_parts_cannot_fill_the_disk(client: openai.OpenAI, server: Any) -> None:
    upload = create(client, 100)
    for _ in range(3):  # the stock client sends a part three times at most
        client.uploads.parts.create(upload.id, data=b"x" * 100)
    with pytest.raises(openai.BadRequestError, match="more than 3 times"):
        client.uploads.parts.create(upload.id, data=b"x")
    assert len(contents(server, "uploads")) == 3


def test_an_upload_has_the_limit_of_a_file(client: openai.OpenAI, server: Any) -> None:
    server.service.limits = Limits(max_file_bytes=1000, max_files=2)
    with pytest.raises(openai.APIStatusError, match="limit of 1000 bytes") as caught:
        create(client, 1001)
    assert caught.value.status_code == 413
    uploads = [create(client, 1000) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="it may, 2"):
        create(client, 1000)
    client.uploads.cancel(uploads[0].id)
    create(client, 1000)
