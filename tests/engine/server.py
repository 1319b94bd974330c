"""`vllm serve` as a user starts it, in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

NAME = "SmolLM2-135M-Instruct"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _environment() -> dict[str, str]:
    """The user's: an engine in the test's process has put libraries and bindings into ours."""
    own = ("LD_PRELOAD", "OMP_", "KMP_", "VLLM_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return {**kept, "PYTHONUNBUFFERED": "1"}


class Server:
    """A running server.

    Args:
        model: folder of the model.
        log: file for its output.
        flags: of the command line, after the ones that every test server has.
        compiled: as a user's server is; minutes more where a machine has not compiled it yet.
    """

    def __init__(
        self, model: Path, log: Path, *flags: str, compiled: bool = False, timeout: float = 600
    ) -> None:
        if not compiled:
            flags = (*flags, "--enforce-eager")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [
            str(Path(sys.executable).parent / "vllm"), "serve", str(model),
            "--served-model-name", NAME, "--port", str(self.port), "--host", "127.0.0.1",
            "--dtype", "float32", "--max-model-len", "1024",
            "--kv-cache-memory-bytes", str(1 << 29), *flags,
        ]  # fmt: skip
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(),
            )
        try:
            self._wait_until_healthy(timeout)
        except BaseException:  # a test that is interrupted has nothing yet to kill
            self.kill()
            raise

    def _wait_until_healthy(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def terminate(self, timeout: float = 60) -> int:
        """SIGTERM, as a process manager sends it; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL to every process of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def train_file(client: openai.OpenAI, lines: list[str]) -> str:
    """Uploads JSONL lines; the file's id."""
    data = "\n".join(lines).encode()
    return client.files.create(file=("train.jsonl", data), purpose="fine-tune").id


def start_job(client: openai.OpenAI, file_id: str, model: str = NAME, suffix: str | None = None,
              lora: dict[str, Any] | None = None, **hyperparameters: Any) -> Any:  # fmt: skip
    method = {
        "type": "supervised",
        "supervised": {"hyperparameters": hyperparameters, "lora": lora or {}},
    }
    more = {"suffix": suffix} if suffix else {}
    return client.fine_tuning.jobs.create(
        model=model,
        training_file=file_id,
        method=method,
        **more,  # type: ignore[arg-type]
    )


def wait_for(client: openai.OpenAI, job_id: str, timeout: float = 480) -> Any:
    """The job, once it has ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.2)
    raise TimeoutError(job_id)


def wait_for_step(client: openai.OpenAI, job_id: str, step: int = 1, timeout: float = 120) -> None:
    """Until the job has done this many optimizer steps."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
        if any(e.type == "metrics" and e.data["step"] >= step for e in events):  # type: ignore
            return
        time.sleep(0.1)
    raise TimeoutError(job_id)


def wait_for_status(client: openai.OpenAI, job_id: str, status: str, timeout: float = 60) -> None:
    """Until the job has this status."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = client.fine_tuning.jobs.retrieve(job_id).status
        if found == status:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{job_id} is {found}")


def steps(client: Any, job_id: str) -> list[tuple[int, float]]:
    """Step and loss of every metrics event, oldest first."""
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=100))  # all pages
    return [(e.data["step"], e.data["train_loss"]) for e in events[::-1] if e.type == "metrics"]


def steps_within(client: Any, file_id: str, seconds: float, warm_up: int = 20,
                 **options: Any) -> int:  # fmt: skip
    """Steps that a job does in this time on this machine, once it has done ``warm_up``."""
    job = start_job(client, file_id, max_steps=10_000, **options)
    wait_for_step(client, job.id, warm_up)
    began, first = time.monotonic(), max(step for step, _ in steps(client, job.id))
    time.sleep(4)
    last = max(step for step, _ in steps(client, job.id))
    rate = (last - first) / (time.monotonic() - began)
    client.fine_tuning.jobs.cancel(job.id)
    wait_for(client, job.id)
    return int(rate * seconds)


def generate(client: openai.OpenAI, prompts: list[str], model: str = NAME, max_tokens: int = 24,
             parallel: int = 8) -> list[Any]:  # fmt: skip
    """Greedy completions with the top two logprobs of each token, several at a time."""
    from concurrent.futures import ThreadPoolExecutor

    def one(prompt: str) -> Any:
        return client.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, logprobs=2
        ).choices[0]

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, prompts))
