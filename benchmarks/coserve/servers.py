"""``vllm serve`` as a user starts it, compiled, with all cores; stock or with finetuning."""

import os
import socket
import sys
import time
from pathlib import Path

import httpx

from benchmarks.coserve.processes import ProcessGroup
from benchmarks.engine import all_cores

# Of every server.
FLAGS = (
    "--served-model-name", "base", "--host", "127.0.0.1", "--dtype", "float32",
    "--max-model-len", "1024", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 30),
    "--no-enable-prefix-caching", "--seed", "0", "--disable-uvicorn-access-log",
)  # fmt: skip
START_TIMEOUT = 600.0
# Seconds in which the requests that a client gave up leave the engine.
SETTLE = 1.0


class Server:
    """A running server; it sleeps from its start until :meth:`resume`.

    Args:
        model: folder of the model.
        log: file that its output is appended to.
        flags: beyond :data:`FLAGS`.

    Attributes:
        url: of its API.
        started_in: seconds until it was ready.
        idle_cpu: share of a core that it uses without requests.
    """

    def __init__(self, model: str, log: Path, *flags: str) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.flags = flags
        vllm = str(Path(sys.executable).parent / "vllm")
        command = [vllm, "serve", model, "--port", str(port), *FLAGS, *flags]
        began = time.monotonic()
        self.group = ProcessGroup(command, log, clean_environment() | all_cores())
        self._wait_until_ready(began + START_TIMEOUT)
        self.started_in = time.monotonic() - began
        time.sleep(SETTLE)
        before = self.group.cpu_seconds()
        time.sleep(2.0)
        self.idle_cpu = (self.group.cpu_seconds() - before) / 2.0
        self.group.pause()

    def _wait_until_ready(self, deadline: float) -> None:
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            self.group.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no server after {START_TIMEOUT:.0f} s, see {self.group.log}")
            time.sleep(0.5)

    def resume(self) -> None:
        self.group.check()
        self.group.resume()

    def pause(self) -> None:
        """Sleeps once it is idle: a step that is cut in two would look like a stalled worker."""
        time.sleep(SETTLE)
        self.group.check()
        self.group.pause()

    def end(self) -> None:
        self.group.end(seconds=30)


def clean_environment() -> dict[str, str]:
    """The user's, without what an engine in this process may have put into it."""
    own = ("LD_PRELOAD", "OMP_", "KMP_", "VLLM_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return kept | {"PYTHONUNBUFFERED": "1"}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
