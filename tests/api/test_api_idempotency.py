"""``Idempotency-Key`` on the creation of files and jobs."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import select

from flexllm_vllm.api import fine_tuning
from flexllm_vllm.jobs import JobStore, idempotency, schema
from flexllm_vllm.jobs.idempotency import IdempotencyClaim

Upload = Callable[..., str]
LINE = b'{"prompt": "a", "completion": "b"}\n'


def headers(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


def key_of(route: str) -> IdempotencyClaim:
    return IdempotencyClaim("local", route, "1")


def create_file(client: openai.OpenAI, key: str, content: bytes = LINE, name: str = "a") -> str:
    return client.files.create(
        file=(name, content), purpose="fine-tune", extra_headers=headers(key)
    ).id


def create_job(client: openai.OpenAI, file_id: str, key: str, **options: Any) -> str:
    return client.fine_tuning.jobs.create(
        model="demo", training_file=file_id, extra_headers=headers(key), **options
    ).id


def test_the_same_request_creates_one_object(client: openai.OpenAI) -> None:
    file_id = create_file(client, "1")
    assert create_file(client, "1") == file_id
    assert create_file(client, "2") != file_id
    job_id = create_job(client, file_id, "1")
    client.fine_tuning.jobs.cancel(job_id)
    assert create_job(client, file_id, "1") == job_id
    assert len(list(client.fine_tuning.jobs.list())) == 1
    assert len(list(client.files.list())) == 2


def test_another_request_with_the_key_is_a_conflict(client: openai.OpenAI) -> None:
    file_id = create_file(client, "1")
    create_job(client, file_id, "1")
    for call in (
        lambda: create_file(client, "1", LINE * 2),
        lambda: create_file(client, "1", name="b"),
        lambda: create_job(client, file_id, "1", seed=1),
    ):
        with pytest.raises(openai.ConflictError) as caught:
            call()
        assert caught.value.code == "idempotency_key_in_use"
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_request_that_failed_may_be_sent_again(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    file_id = upload()
    load = server.service.load_tokenizer
    server.service.load_tokenizer = lambda: 1 / 0
    with pytest.raises(openai.InternalServerError):
        create_job(client, file_id, "1")
    server.service.load_tokenizer = load
    create_job(client, file_id, "1")


def test_duplicates_at_the_same_time_create_one_job(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    file_id = upload()
    load = server.service.load_tokenizer
    has_key, may_go_on = threading.Event(), threading.Event()

    def slow() -> Any:
        has_key.set()  # claimed before anything is loaded
        may_go_on.wait(30)
        return load()

    server.service.load_tokenizer = slow
    with ThreadPoolExecutor() as pool:
        first = pool.submit(create_job, client, file_id, "1")
        assert has_key.wait(30)
        body = {"model": "demo", "training_file": file_id}
        url = f"{server.url}/v1/fine_tuning/jobs"
        answer = httpx.post(url, json=body, headers=headers("1"))
        assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
        assert answer.json()["error"]["code"] == "idempotency_key_pending"
        patient = client.with_options(max_retries=5)
        repeated = [pool.submit(create_job, patient, file_id, "1") for _ in range(3)]
        may_go_on.set()
        assert {r.result() for r in repeated} == {first.result()}
    assert len(list(client.fine_tuning.jobs.list())) == 1


def test_a_key_of_a_process_that_died_is_free(server: Any, client: openai.OpenAI) -> None:
    with JobStore(server.store.root) as other:
        assert other.idempotency.claim(key_of("files"), "x") is None
        with pytest.raises(RuntimeError, match="was used for another request"):
            server.store.idempotency.claim(key_of("files"), "y")
    assert server.store.idempotency.claim(key_of("files"), "x") is None


def test_a_job_and_its_key_are_stored_together(
    server: Any, client: openai.OpenAI, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is lost right after the job was stored."""
    file_id = upload()
    with monkeypatch.context() as patched:
        patched.setattr(fine_tuning, "job_object", lambda *args: 1 / 0)
        with pytest.raises(openai.InternalServerError):
            create_job(client, file_id, "1")
    assert create_job(client, file_id, "1") == client.fine_tuning.jobs.list().data[0].id
    assert len(list(client.fine_tuning.jobs.list())) == 1


def test_keys_are_kept_for_a_day(
    server: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = create_file(client, "1")
    today = idempotency.now()
    monkeypatch.setattr(idempotency, "now", lambda: today + 24 * 3600 - 60)
    assert create_file(client, "1") == first
    monkeypatch.setattr(idempotency, "now", lambda: today + 24 * 3600 + 60)
    assert create_file(client, "1") != first
    server.store.sweep()
    with server.store._database.read() as connection:
        assert len(connection.execute(select(schema.idempotency_keys)).all()) == 1


def test_the_key_of_a_deleted_object_stays_used(client: openai.OpenAI) -> None:
    client.files.delete(create_file(client, "1"))
    with pytest.raises(openai.ConflictError, match="deleted since"):
        create_file(client, "1")


def test_a_key_that_is_none_is_refused(client: openai.OpenAI) -> None:
    for key in ("", "x" * 256):
        with pytest.raises(openai.BadRequestError) as caught:
            create_file(client, key)
        assert caught.value.param == "Idempotency-Key"
