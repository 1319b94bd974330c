"""Files that are deleted, or refused, while they are on their way."""

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from flexllm_vllm.api.file_service import FileService
from flexllm_vllm.api.job_data import JobData
from flexllm_vllm.jobs.files import FileStore

Upload = Callable[..., str]


@pytest.mark.parametrize("which", ["training_file", "validation_file"])
@pytest.mark.parametrize("moment", ["found", "checked", "tokenized"])
def test_a_file_that_is_deleted_while_its_job_is_created_is_not_found(
    server: Any,
    client: openai.OpenAI,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    moment: str,
) -> None:
    files = {"training_file": upload(), "validation_file": upload()}
    check_job, tokenize = FileService.check_job, JobData.tokenize

    def checked(self: Any, path: Any) -> None:
        if moment == "found":
            client.files.delete(files[which])
        check_job(self, path)

    def tokenized(self: Any, source: Any, target: Any, method: Any, length: int, param: str) -> Any:
        if (moment, which) == ("checked", param):
            client.files.delete(files[which])
        report = tokenize(self, source, target, method, length, param)
        if (moment, which) == ("tokenized", param):
            client.files.delete(files[which])
        return report

    monkeypatch.setattr(FileService, "check_job", checked)
    monkeypatch.setattr(JobData, "tokenize", tokenized)
    with pytest.raises(openai.NotFoundError, match=files[which]) as caught:
        client.fine_tuning.jobs.create(model="demo", **files)
    assert (caught.value.param, caught.value.code) == (which, "file_not_found")
    assert list((server.store.root / "jobs").iterdir()) == []
    assert list(client.fine_tuning.jobs.list()) == []


def test_a_file_that_expires_while_its_job_is_created_is_not_missed(
    server: Any, client: openai.OpenAI, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job has its tokens by then; it keeps the file until it has ended."""
    file_id = upload()
    tokenize = JobData.tokenize

    def tokenized(self: Any, *arguments: Any) -> Any:
        report = tokenize(self, *arguments)
        with server.store._database.write() as connection:
            connection.exec_driver_sql("UPDATE files SET expires_at = 1")
        return report

    monkeypatch.setattr(JobData, "tokenize", tokenized)
    job = client.fine_tuning.jobs.create(model="demo", training_file=file_id)
    server.store.sweep()
    assert (server.store.root / "files" / file_id).exists()
    client.fine_tuning.jobs.cancel(job.id)
    server.store.sweep()
    assert not (server.store.root / "files" / file_id).exists()


def test_a_file_that_is_deleted_while_it_is_sent_is_sent_to_its_end(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"prompt": "a", "completion": "b"}\n' * 300_000
    file_id = client.files.create(file=("a.jsonl", content), purpose="fine-tune").id
    with client.files.with_streaming_response.content(file_id) as answer:
        client.files.delete(file_id)
        assert b"".join(answer.iter_bytes()) == content
        assert answer.headers["content-length"] == str(len(content))
        assert 'filename="a.jsonl"' in answer.headers["content-disposition"]


def test_a_file_that_is_deleted_before_it_is_sent_is_not_found(
    client: openai.OpenAI, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id, path = upload(), FileStore.path

    def deleted(self: Any, *arguments: Any) -> Any:
        found = path(self, *arguments)
        monkeypatch.undo()
        client.files.delete(file_id)
        return found

    monkeypatch.setattr(FileStore, "path", deleted)
    with pytest.raises(openai.NotFoundError, match=file_id):
        client.files.content(file_id)


def test_a_part_of_a_file_can_be_asked_for(server: Any, client: openai.OpenAI) -> None:
    content = b'{"prompt": "a", "completion": "b"}'
    file_id = client.files.create(file=("a.jsonl", content), purpose="fine-tune").id
    url = f"{server.url}/v1/files/{file_id}/content"
    answer = httpx.get(url, headers={"Range": "bytes=2-7"})
    assert (answer.status_code, answer.content) == (206, content[2:8])


def test_a_purpose_is_refused_before_the_file_is_sent(server: Any) -> None:
    """With the fields first, as the stock client sends them."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.settimeout(20)
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
            b"--x\r\n"
        )
        answer = connection.recv(65536)
        while b"}}" not in answer:
            answer += connection.recv(65536)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    error = json.loads(body)["error"]
    assert (error["param"], error["type"]) == ("purpose", "invalid_request_error")
    assert "'assistants' is not one of ['fine-tune']" in error["message"]
    assert list((server.store.root / "files").iterdir()) == []
