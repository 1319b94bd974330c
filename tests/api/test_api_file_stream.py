"""Bodies on their way to disk: large ones, many at once, and those that never end."""

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

LINE = b'{"prompt": "a", "completion": "b"}\n'
MIB = 1 << 20


class Generated(io.RawIOBase):
    """A file of ``size`` bytes of examples, 64 KiB each, that is nowhere."""

    LINE = b'{"prompt": "' + b"a" * (65536 - 34) + b'", "completion": "b"}\n'

    def __init__(self, size: int) -> None:
        assert len(self.LINE) == 65536
        self._size = size - size % 65536
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        begin = self._at % 65536
        piece = self.LINE[begin : begin + min(len(buffer), self._size - self._at)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class Process:
    """A server of files, to be killed."""

    def __init__(self, root: Path) -> None:
        script = Path(__file__).with_name("file_server.py")
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(root)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=5)

    def memory(self, name: str) -> int:
        """Bytes, of a line of ``/proc/<pid>/status``."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start() -> Process:
        started.append(Process(tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def names(root: Path, folder: str) -> set[str]:
    return {path.name for path in (root / folder).iterdir()}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_file_goes_straight_to_its_place(start: Callable[[], Process]) -> None:
    server = start()
    server.client.files.create(file=("small.jsonl", Generated(4 * MIB)), purpose="fine-tune")
    before = server.memory("VmRSS")
    file = server.client.files.create(file=("a.jsonl", Generated(300 * MIB)), purpose="fine-tune")
    assert file.bytes == 300 * MIB
    assert server.memory("VmHWM") - before < 64 * MIB
    upload = server.client.uploads.create(
        bytes=128 * MIB, filename="b.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    parts = [
        server.client.uploads.parts.create(upload.id, data=("data", Generated(64 * MIB))).id
        for _ in range(2)
    ]
    assert server.client.uploads.complete(upload.id, part_ids=parts).status == "completed"
    assert server.memory("VmHWM") - before < 64 * MIB


def test_what_a_killed_server_left_is_removed(start: Callable[[], Process], tmp_path: Path) -> None:
    server = start()
    file = server.client.files.create(file=("a", LINE), purpose="fine-tune")
    upload = server.client.uploads.create(
        bytes=2 * len(LINE), filename="b", mime_type="text/jsonl", purpose="fine-tune"
    )
    part = server.client.uploads.parts.create(upload.id, data=LINE)
    paths = ("files", f"uploads/{upload.id}/parts")
    connections = [begin(server.port, path) for path in paths]
    wait_until(lambda: len(names(tmp_path, "files")) == len(names(tmp_path, "uploads")) == 2)
    # As if it had died between the place of a content and its row.
    (tmp_path / "files" / "file-without-row").write_bytes(LINE)
    (tmp_path / "uploads" / "part_without_row").write_bytes(LINE)
    server.kill()
    for connection in connections:
        connection.close()
    server = start()
    assert server.client.files.retrieve(file.id) == file
    assert names(tmp_path, "files") == {file.id}
    assert names(tmp_path, "uploads") == {part.id}
    another = server.client.uploads.parts.create(upload.id, data=LINE)
    done = server.client.uploads.complete(upload.id, part_ids=[part.id, another.id])
    assert done.status == "completed"


def begin(port: int, path: str) -> socket.socket:
    """Send the first half of a form."""
    connection = socket.create_connection(("127.0.0.1", port))
    field = "file" if path == "files" else "data"
    connection.sendall(
        f"POST /v1/{path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a"\r\n\r\n'.encode()
        + LINE * 100_000
    )
    return connection


def test_a_client_that_breaks_off_leaves_nothing(
    server: Any, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    root, port = server.store.root, int(server.url.rpartition(":")[2])
    upload = client.uploads.create(
        bytes=9_000_000, filename="b", mime_type="text/jsonl", purpose="fine-tune"
    )
    for path in ("files", f"uploads/{upload.id}/parts"):
        folder = root / path.split("/")[0]
        connection = begin(port, path)
        wait_until(lambda folder=folder: any(file.stat().st_size for file in folder.iterdir()))
        connection.close()
        wait_until(lambda folder=folder: not any(folder.iterdir()))
    assert client.files.list().data == []
    assert "failed" not in caplog.text


def test_eight_files_at_once(server: Any, client: openai.OpenAI) -> None:
    def content(i: int) -> bytes:
        return b'{"prompt": "%d", "completion": "b"}\n' % i * 40_000

    def upload(i: int) -> str:
        return client.files.create(file=(f"{i}.jsonl", content(i)), purpose="fine-tune").id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(upload, range(8)))
    for i, file_id in enumerate(ids):
        assert client.files.retrieve(file_id).filename == f"{i}.jsonl"
        assert client.files.content(file_id).read() == content(i)
    assert names(server.store.root, "files") == set(ids)


def test_the_number_of_files_holds_for_those_at_once(server: Any, client: openai.OpenAI) -> None:
    server.service.limits = type(server.service.limits)(max_files=3)

    def upload(i: int) -> bool:
        try:
            client.files.create(file=(f"{i}.jsonl", LINE * 40_000), purpose="fine-tune")
        except openai.RateLimitError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(upload, range(8))) == 3
    assert len(names(server.store.root, "files")) == 3


def test_others_are_answered_while_files_are_checked(
    server: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, waiting = threading.Event(), threading.Semaphore(0)

    def slow(_path: Path) -> int:
        waiting.release()
        assert checked.wait(20)
        return 1

    monkeypatch.setattr("flexllm_vllm.api.file_service.check_file", slow)
    count = 2 * (os.cpu_count() or 1) + 8  # more than asyncio has threads here
    with ThreadPoolExecutor(count) as pool:
        uploads = [
            pool.submit(client.files.create, file=("a", LINE), purpose="fine-tune")
            for _ in range(count)
        ]
        try:
            assert waiting.acquire(timeout=20)
            wait_until(lambda: len(names(server.store.root, "files")) == count)
            assert client.with_options(timeout=10).files.list().data == []
        finally:
            checked.set()
        assert len({upload.result().id for upload in uploads}) == count
