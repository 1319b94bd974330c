"""The two ways to train: a PEFT process, and a job of our server. Both sleep between cells."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from benchmarks.coserve.ceiling import Mixed, mixed_between, read_metrics
from benchmarks.coserve.client import LoadRecord
from benchmarks.coserve.data import BATCH, LENGTH, micro_batches
from benchmarks.coserve.figures import trained_by_steps, trained_in_iterations
from benchmarks.coserve.processes import ProcessGroup
from benchmarks.coserve.servers import Server, clean_environment
from benchmarks.train.workload import R, make_adapter

LEARNING_RATE = 1e-4
# More than any run gets through.
MAX_STEPS = 1_000_000
# The engine keeps 8192 iterations; a decode step takes no less than 10 ms.
POLL_SECONDS = 75.0


@dataclass(frozen=True)
class Trained:
    """Training in a measuring window, in tokens/s.

    Attributes:
        tokens_per_s: a token counts a third for its forward, the rest for its backward.
        forward_per_s, backward_per_s: the parts; None where a step is counted whole.
        steps_per_s: by the optimizer steps that ended in the window; coarse, as a check.
        mixed: iterations beside requests, since the job began; None where a step is counted whole.
    """

    tokens_per_s: float
    forward_per_s: float | None = None
    backward_per_s: float | None = None
    steps_per_s: float | None = None
    mixed: Mixed | None = None


class Training(Protocol):
    """Something that trains between ``begin`` and ``end``."""

    group: ProcessGroup | None
    """Of the trainer; None if it lives in a server."""

    def begin(self) -> None: ...

    def poll(self) -> None:
        """Called at least every :data:`POLL_SECONDS`."""

    def trained(self, record: LoadRecord) -> Trained:
        """Of a client's window, which has just ended."""

    def end(self) -> None: ...


class PeftTraining:
    """HF PEFT in a process of its own (``peft_loop.py``)."""

    def __init__(self, model: str, data: Path, folder: Path) -> None:
        self._marks = folder / "peft-marks.txt"
        self._marks.write_text("")
        examples = folder / "peft-examples.json"
        examples.write_text(json.dumps(micro_batches(data, model)))
        adapter = make_adapter(model, folder / "adapter")
        module = "benchmarks.coserve.peft_loop"
        command = [sys.executable, "-m", module, model, str(adapter), str(examples)]
        self.group: ProcessGroup | None = ProcessGroup(
            [*command, str(self._marks)], folder / "peft.log", clean_environment()
        )
        self._process = self.group
        self._wait_beyond(-1.0)
        self._process.pause()

    def begin(self) -> None:
        self._process.check()
        self._process.resume()

    def poll(self) -> None:
        self._process.check()

    def trained(self, record: LoadRecord) -> Trained:
        assert record.training_cpu is not None
        begin, end = record.training_cpu
        self._process.resume()
        self._wait_beyond(end)
        tokens = trained_by_steps(self._read_marks(), begin, end)
        return Trained(tokens / (record.end - record.begin))

    def end(self) -> None:
        self._process.pause()

    def close(self) -> None:
        self._process.end()

    def _read_marks(self) -> list[tuple[float, int]]:
        lines = [line.split() for line in self._marks.read_text().splitlines(keepends=True)
                 if line.endswith("\n")]  # fmt: skip
        return [(float(cpu), int(tokens)) for cpu, tokens in lines]

    def _wait_beyond(self, cpu: float, timeout: float = 600.0) -> None:
        """Until it has finished an example after so many processor seconds."""
        deadline = time.monotonic() + timeout
        while not (marks := self._read_marks()) or marks[-1][0] < cpu:
            self._process.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"PEFT does not get on, see {self._process.log}")
            time.sleep(0.1)


class JobTraining:
    """A job of our server, created for each cell and cancelled after it."""

    group: ProcessGroup | None = None

    def __init__(self, server: Server, model: str, data: Path) -> None:
        self._server = server
        self._data = data
        self._num_layers = int(
            json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
        )
        self._file_id: str | None = None
        self._job_id: str | None = None
        self._iterations: dict[float, dict[str, Any]] = {}
        self._before: dict[str, dict[str, float]] = {}
        self._began = 0.0

    def begin(self) -> None:
        if self._file_id is None:
            upload = {"file": ("train.jsonl", self._data.read_bytes())}
            answer = self._request("POST", "files", files=upload, data={"purpose": "fine-tune"})
            self._file_id = answer["id"]
        hyperparameters = {
            "batch_size": BATCH, "max_steps": MAX_STEPS, "max_seq_length": LENGTH,
            "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
        }  # fmt: skip
        job = {
            "model": "base",
            "training_file": self._file_id,
            "seed": 0,
            "method": {
                "type": "supervised",
                "supervised": {
                    "hyperparameters": hyperparameters,
                    "lora": {"r": R, "lora_alpha": 2 * R},
                },
            },
        }
        self._job_id = self._request("POST", "fine_tuning/jobs", json=job)["id"]
        self._iterations = {}
        self._wait_for("running")
        self._before = self._scrape()
        self._began = time.time()

    def poll(self) -> None:
        found = self._request("GET", "finetuning/iterations", params={"last": 10_000})["data"]
        self._iterations |= {i["start_time"]: i for i in found}

    def trained(self, record: LoadRecord) -> Trained:
        self.poll()
        forward, backward = trained_in_iterations(
            list(self._iterations.values()), self._num_layers, record.begin, record.end
        )
        seconds = record.end - record.begin
        _, through_layers = trained_in_iterations(
            list(self._iterations.values()), self._num_layers, self._began, time.time()
        )
        return Trained(
            tokens_per_s=(forward / 3 + 2 / 3 * backward) / seconds,
            forward_per_s=forward / seconds,
            backward_per_s=backward / seconds,
            steps_per_s=self._step_tokens(record.begin, record.end) / seconds,
            mixed=mixed_between(self._before, self._scrape(), through_layers),
        )

    def end(self) -> None:
        if self._job_id is not None:
            self._request("POST", f"fine_tuning/jobs/{self._job_id}/cancel")
            self._wait_for("cancelled")
            self._job_id = None

    def _step_tokens(self, begin: float, end: float) -> int:
        tokens, after, more = 0, None, True
        while more:
            page = self._request(
                "GET", f"fine_tuning/jobs/{self._job_id}/events",
                params={"limit": 100} | ({"after": after} if after else {}),
            )  # fmt: skip
            events, more = page["data"], page["has_more"]
            for event in events:
                if event["type"] == "metrics" and begin <= event["created_at"] < end:
                    tokens += event["data"]["tokens"]
            after = events[-1]["id"] if events else None
        return tokens

    def _wait_for(self, status: str, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while True:
            job = self._request("GET", f"fine_tuning/jobs/{self._job_id}")
            if job["status"] == status:
                return
            if job["status"] == "failed" or time.monotonic() > deadline:
                raise RuntimeError(f"the job is {job['status']}, not {status}: {job['error']}")
            time.sleep(0.1)

    def _scrape(self) -> dict[str, dict[str, float]]:
        return read_metrics(httpx.get(f"{self._server.url}/metrics", timeout=60).text)

    def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        url = f"{self._server.url}/v1/{path}"
        answer = httpx.request(method, url, timeout=60, **options)
        if answer.is_error:
            raise RuntimeError(f"{method} {url}: {answer.status_code} {answer.text[:500]}")
        return answer.json()
