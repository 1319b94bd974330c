"""What a server takes in, and how it says no: seen by the stock client, which repeats whole uploads
unless it is told not to."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from flexllm_vllm.api.limits import Limits
from flexllm_vllm.jobs import disk

LINE = b'{"prompt": "a", "completion": "b"}\n'
HEAD = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
HEADERS = {"content-type": "multipart/form-data; boundary=x"}


class Retrying:
    """A client that tries again, as it does by default, and counts."""

    def __init__(self, url: str) -> None:
        self.attempts = 0
        self.client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [self._count]}),
        )

    def _count(self, _response: Any) -> None:
        self.attempts += 1

    def upload(self, content: Any) -> Any:
        return self.client.files.create(file=("data.jsonl", content), purpose="fine-tune")


@pytest.fixture
def retrying(server: Any) -> Retrying:
    return Retrying(server.url)


def contents(server: Any) -> list[str]:
    return [path.name for path in (server.store.root / "files").iterdir()]


@pytest.fixture(params=["h11", "httptools"])
def http(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of HTTP that uvicorn has; to be named before ``server``."""
    config = uvicorn.Config
    monkeypatch.setattr(uvicorn, "Config", lambda *a, **k: config(*a, **k, http=request.param))
    return request.param


@pytest.mark.parametrize("size", [3_000_001, 40_000_000])  # found on the way, and announced
def test_a_file_above_the_limit_is_refused(
    http: str, server: Any, retrying: Retrying, size: int
) -> None:
    server.service.limits = Limits(max_file_bytes=3_000_000)
    with pytest.raises(openai.APIStatusError, match="limit of 3000000 bytes") as caught:
        retrying.upload(b"x" * size)
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert retrying.attempts == 1
    assert contents(server) == []
    assert retrying.upload(LINE).bytes == len(LINE)  # on the same connection


def test_a_file_of_the_limit_is_taken(server: Any, retrying: Retrying) -> None:
    server.service.limits = Limits(max_file_bytes=len(LINE))
    retrying.upload(LINE)
    with pytest.raises(openai.APIStatusError, match="limit"):
        retrying.upload(LINE + b"\n")


def test_a_body_of_no_announced_length_is_refused_on_the_way(http: str, server: Any) -> None:
    server.service.limits = Limits(max_file_bytes=3_000_000)

    def body() -> Iterator[bytes]:
        yield HEAD
        for _ in range(100):
            yield b"x" * 200_000
        yield b"\r\n--x--\r\n"

    answer = httpx.post(f"{server.url}/v1/files", content=body(), headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert contents(server) == []


def test_a_body_of_no_announced_length_is_taken(http: str, server: Any) -> None:
    def body() -> Iterator[bytes]:
        yield HEAD
        for _ in range(1000):
            yield LINE
        yield b"\r\n--x--\r\n"

    answer = httpx.post(f"{server.url}/v1/files", content=body(), headers=HEADERS)
    assert (answer.status_code, answer.json()["bytes"]) == (200, 1000 * len(LINE))


def test_an_announced_length_is_refused_before_the_body_is_sent(http: str, server: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 999999999999\r\n\r\n"
        )
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_the_number_of_files_is_limited(server: Any, retrying: Retrying) -> None:
    server.service.limits = Limits(max_files=2)
    ids = [retrying.upload(LINE).id for _ in range(2)]
    retrying.attempts = 0
    with pytest.raises(openai.RateLimitError, match="it may, 2") as caught:
        retrying.upload(LINE)
    assert (caught.value.code, retrying.attempts) == ("too_many_files", 1)
    retrying.client.files.delete(ids[0])
    retrying.upload(LINE)


def test_results_of_jobs_do_not_count(server: Any, retrying: Retrying, tmp_path: Path) -> None:
    server.service.limits = Limits(max_files=1)
    content = tmp_path / "results.csv"
    content.write_bytes(b"step\n1\n")
    with content.open("rb") as source:
        server.store.files.create(source, "step_metrics.csv", "fine-tune-results")
    retrying.upload(LINE)
    purposes = [file.purpose for file in retrying.client.files.list()]
    assert purposes == ["fine-tune", "fine-tune-results"]


def test_the_number_of_examples_is_limited(server: Any, retrying: Retrying) -> None:
    server.service.limits = Limits(max_examples=2)
    retrying.upload(LINE * 2)
    with pytest.raises(openai.APIStatusError) as caught:
        retrying.upload(LINE * 3)
    assert (caught.value.status_code, caught.value.code) == (413, "too_many_examples")
    upload = retrying.client.uploads.create(
        bytes=3 * len(LINE), filename="a", mime_type="text/jsonl", purpose="fine-tune"
    )
    part = retrying.client.uploads.parts.create(upload.id, data=LINE * 3)
    with pytest.raises(openai.APIStatusError, match="limit is 2"):
        retrying.client.uploads.complete(upload.id, part_ids=[part.id])


def test_the_folder_has_a_quota(server: Any, retrying: Retrying) -> None:
    used = disk.folder_bytes(server.store.root)
    server.service.limits = Limits(max_disk_bytes=used + 2_000_000)
    file = retrying.upload(LINE * 30_000)
    retrying.attempts = 0
    for action in (
        lambda: retrying.upload(LINE * 30_000),
        lambda: retrying.client.uploads.create(
            bytes=1_500_000, filename="a", mime_type="text/jsonl", purpose="fine-tune"
        ),
    ):
        with pytest.raises(openai.InternalServerError, match="--finetuning-max-disk") as caught:
            action()
        assert (caught.value.status_code, caught.value.code) == (507, "insufficient_storage")
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert retrying.attempts == 2
    assert contents(server) == [file.id]
    retrying.client.files.delete(file.id)
    retrying.upload(LINE * 30_000)


def test_jobs_need_room_too(server: Any, retrying: Retrying) -> None:
    file = retrying.upload(LINE)
    server.service.limits = Limits(max_disk_bytes=disk.folder_bytes(server.store.root))
    with pytest.raises(openai.InternalServerError) as caught:
        retrying.client.fine_tuning.jobs.create(model="demo", training_file=file.id)
    assert caught.value.status_code == 507


@pytest.mark.parametrize("looks", [0, 2])  # full at once, and on the way
def test_some_of_the_disk_stays_free(
    server: Any, retrying: Retrying, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    usage, count = disk.shutil.disk_usage, iter(range(1000))

    def full(path: Any) -> Any:
        real = usage(path)
        return real._replace(free=(1 << 62) if next(count) < looks else disk.RESERVE_BYTES // 50)

    monkeypatch.setattr(disk.shutil, "disk_usage", full)
    with pytest.raises(openai.InternalServerError, match="full") as caught:
        retrying.upload(b"x" * 40_000_000)
    assert (caught.value.status_code, retrying.attempts) == (507, 1)
    assert contents(server) == []


def test_a_disk_that_is_full_says_so(
    server: Any, retrying: Retrying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexllm_vllm.jobs.content.os.fsync", full)
    with pytest.raises(openai.InternalServerError, match="full") as caught:
        retrying.upload(LINE)
    assert (caught.value.status_code, caught.value.code) == (507, "insufficient_storage")
    assert contents(server) == []


def test_the_queue_is_limited(
    server: Any, client: openai.OpenAI, upload: Callable[..., str]
) -> None:
    server.service.limits = Limits(max_queued_jobs=1)
    file = upload()
    first = client.fine_tuning.jobs.create(model="demo", training_file=file)
    with pytest.raises(openai.RateLimitError, match="limit: 1") as caught:
        client.fine_tuning.jobs.create(model="demo", training_file=file)
    assert caught.value.code == "too_many_queued_jobs"
    assert caught.value.response.headers["retry-after"] == "30"
    assert "x-should-retry" not in caught.value.response.headers
    server.store.claim_next_job()
    assert client.fine_tuning.jobs.create(model="demo", training_file=file).id != first.id
