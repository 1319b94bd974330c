"""Starts and stops `vllm serve` with the demo model and finetuning."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

MODEL_NAME = "SmolLM2-135M-Instruct"
ROOT = Path(__file__).parent.parent


def model_path() -> str:
    """The demo model's folder, converted on first use."""
    script = ROOT / "setup" / "demo_model.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def command(port: int, folder: Path) -> list[str]:
    """The command line; only the memory and length limits are there to be easy on a laptop."""
    return [
        str(Path(sys.executable).parent / "vllm"), "serve", model_path(),
        "--served-model-name", MODEL_NAME,
        "--enable-finetuning",
        "--finetuning-dir", str(folder),
        "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 30),
    ]  # fmt: skip


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path | None) -> None:
    """Returns when the server answers; exits with the end of its log if it does not come up."""
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    end = log.read_text()[-3000:] if log else ""
    raise SystemExit(f"{end}\nThe server did not start; its log: {log}")


@contextlib.contextmanager
def running(
    folder: Path, log: Path, waiting: Callable[[], contextlib.AbstractContextManager[object]]
) -> Iterator[str]:
    """A server for the time of a ``with``; yields its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(port, folder), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        with waiting():
            wait_until_ready(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its engine and its worker
            process.wait()
