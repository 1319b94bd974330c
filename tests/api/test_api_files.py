import time
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


def contents(server: Any) -> set[str]:
    """What lies in the folder of files."""
    return {path.name for path in (server.store.root / "files").iterdir()}


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
    assert [f.id for f in client.files.list(limit=10_000, purpose="fine-tune")] == ids[::-1]
    assert client.files.list(after=ids[1], limit=1).data[0].id == ids[0]
    assert list(client.files.list(purpose="batch")) == []
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.files.list(limit=10_001)


@pytest.mark.parametrize("method", ["retrieve", "content", "delete"])
def test_an_unknown_file_is_not_found(client: openai.OpenAI, method: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        getattr(client.files, method)("file-none")
    assert caught.value.type == "invalid_request_error"
    assert "file-none" in caught.value.message


def test_content_that_is_gone_from_the_disk_is_not_found(
    client: openai.OpenAI, server: Any
) -> None:
    file = create(client, LINE)
    (server.store.root / "files" / file.id).unlink()
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="demo", training_file=file.id)
    assert client.files.delete(file.id).deleted


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


def test_results_are_not_uploaded(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="written by jobs"):
        create(client, LINE, purpose="fine-tune-results")


def test_files_are_processed_at_once(client: openai.OpenAI) -> None:
    file = client.files.wait_for_processing(create(client, LINE).id, poll_interval=0.01)
    assert (file.status, file.status_details) == ("processed", None)


def test_a_file_expires(client: openai.OpenAI, server: Any, monkeypatch: Any) -> None:
    kept = create(client, LINE)
    file = create(client, LINE, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (kept.expires_at, file.expires_at) == (None, file.created_at + 3600)
    assert client.files.retrieve(file.id) == file
    monkeypatch.setattr(time, "time", lambda: file.created_at + 3600.0)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="demo", training_file=file.id)
    assert [f.id for f in client.files.list()] == [kept.id]
    assert contents(server) == {kept.id, file.id}
    another = create(client, LINE)
    assert contents(server) == {kept.id, another.id}


def test_an_expired_file_stays_on_disk_while_a_job_needs_it(
    client: openai.OpenAI, server: Any, monkeypatch: Any
) -> None:
    file = create(client, LINE, expires_after={"anchor": "created_at", "seconds": 3600})
    job = client.fine_tuning.jobs.create(model="demo", training_file=file.id)
    monkeypatch.setattr(time, "time", lambda: file.created_at + 3600.0)
    server.store.sweep()
    assert file.id in contents(server)
    client.fine_tuning.jobs.cancel(job.id)
    server.store.sweep()
    assert contents(server) == set()


@pytest.mark.parametrize(("expires_after", "param"), [
    ({"anchor": "created_at", "seconds": 3599}, "expires_after.seconds"),
    ({"anchor": "created_at", "seconds": 2_592_001}, "expires_after.seconds"),
    ({"anchor": "created_at", "seconds": "soon"}, "expires_after.seconds"),
    ({"anchor": "last_active_at", "seconds": 3600}, "expires_after.anchor"),
    ({"anchor": "created_at"}, "expires_after.seconds"),
    ({"seconds": 3600}, "expires_after.anchor"),
])  # fmt: skip
def test_a_wrong_expiry_is_refused(
    client: openai.OpenAI, server: Any, expires_after: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, LINE, expires_after=expires_after)
    assert caught.value.param == param
    assert contents(server) == set()


@pytest.mark.parametrize(("given", "shown"), [
    ("../../etc/passwd.jsonl", "passwd.jsonl"),
    ("C:\\data\\train.jsonl", "train.jsonl"),
    ("/etc/passwd", "passwd"),
    ("Übung 🙂.jsonl", "Übung 🙂.jsonl"),
    ("a" * 255, "a" * 255),
    (".hidden", ".hidden"),
])  # fmt: skip
def test_a_file_name_is_for_display(
    client: openai.OpenAI, server: Any, given: str, shown: str
) -> None:
    file = client.files.create(file=(given, LINE), purpose="fine-tune")
    assert file.filename == client.files.retrieve(file.id).filename == shown
    assert contents(server) == {file.id}
    content = client.files.content(file.id)
    assert content.read() == LINE
    assert content.response.headers["content-disposition"].startswith("attachment;")


@pytest.mark.parametrize("name", [
    "a" * 256, "ü" * 256, "..", "data/", "a\x00b", "a\x1b[31m", "a\u202egpj.exe", "a\x85b",
])  # fmt: skip
def test_a_file_name_that_cannot_be_shown_is_refused(server: Any, name: str) -> None:
    form = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n--x--\r\n'
    ) % (name.encode(), LINE)
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{server.url}/v1/files", content=form, headers=headers)
    assert answer.status_code == 400, answer.text
    assert contents(server) == set()


def test_fields_may_follow_the_file(server: Any) -> None:
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + LINE + b"\r\n"
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x--\r\n'
    )
    headers = {"content-type": 'multipart/form-data; boundary="x"'}
    answer = httpx.post(f"{server.url}/v1/files", content=form, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["bytes"] == len(LINE)


def test_a_form_that_is_none_is_refused(server: Any) -> None:
    url = f"{server.url}/v1/files"
    answers = [
        httpx.post(url, json={"file": "x"}),
        httpx.post(url, content=b"x", headers={"content-type": "multipart/form-data"}),
        httpx.post(url, data={"purpose": "fine-tune"}),
        httpx.post(url, files={"file": ("a", LINE)}),
        httpx.post(url, files={"file": ("a", LINE)}, data={"purpose": "fine-tune", "x": "y"}),
        httpx.post(url, files={"file": ("a", LINE)}, data={"purpose": ["fine-tune"] * 2}),
        httpx.post(url, files={"file": ("a", LINE)}, data={"purpose": "x" * 10_000}),
        httpx.post(url, files=[("file", ("a", LINE))] * 2, data={"purpose": "fine-tune"}),
        httpx.post(url, files={"purpose": (None, "fine-tune"), "file": (None, LINE)}),
        *(
            httpx.post(url, content=body, headers={"content-type": f"multipart/form-data; {rest}"})
            for rest in ("boundary=x", "boundary=", "boundary=" + "x" * 5000)
            for body in (
                b"",
                b"--x",
                b"--x--",
                b"--x\r\n\r\n",
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + LINE,
                b"--x\r\nContent-Disposition: " + b"y" * 10_000,
                b"--x\r\n" + b"a: b\r\n" * 100,
            )
        ),
        httpx.get(url, params={"limit": "many"}),
        httpx.get(url, params={"after": "file-none"}),
    ]
    for answer in answers:
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
    assert contents(server) == set()


def test_a_file_in_use_stays(client: openai.OpenAI, upload: Upload) -> None:
    file_id = upload()
    job = client.fine_tuning.jobs.create(model="demo", training_file=file_id)
    with pytest.raises(openai.ConflictError, match=job.id) as caught:
        client.files.delete(file_id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file_id).deleted
