"""A tracker whose client runs in a process of its own (``trackers/program.py``)."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from flexllm_vllm.trackers.errors import TrackerError
from flexllm_vllm.trackers.points import MetricPoint
from flexllm_vllm.trackers.program import open_request, write_request
from flexllm_vllm.trackers.redact import redact
from flexllm_vllm.trackers.run import RunDescription

_PROGRAM = "flexllm_vllm.trackers.program"
# Seconds that an answer may take. The client's import and its network are in them.
ANSWER_S = 180.0
_MAX_ERROR_BYTES = 4096
# What a run may take to be put aside, while the server ends.
_SUSPEND_S = 2.0


class ProcessSink:
    """See :class:`~flexllm_vllm.api.tracker_sinks.Sink`. The process begins with the first point.

    Args:
        kind: ``"wandb"`` or ``"mlflow"``.
        description: the job, for the run.
        environment: of the process; holds the tracker's key.
        live: called while an answer is waited for; what it raises ends the wait.
        answer_s: seconds after which an answer counts as missing.
    """

    rewinds = False

    def __init__(
        self,
        kind: str,
        description: RunDescription,
        environment: Mapping[str, str],
        live: Callable[[], None],
        answer_s: float = ANSWER_S,
    ) -> None:
        self.address: str | None = None
        self._kind = kind
        self._description = description
        self._environment = environment
        self._live = live
        self._answer_s = answer_s
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def write(self, points: Sequence[MetricPoint]) -> None:
        self._begin()
        self._ask(write_request(list(points)))

    def finish(self, status: str, fine_tuned_model: str | None) -> None:
        self._begin()
        self._ask(["finish", status, fine_tuned_model])

    def suspend(self) -> None:
        if self._process is not None:
            with contextlib.suppress(TrackerError):  # the next session goes on all the same
                self._ask(["suspend"], timeout_s=_SUSPEND_S, live=lambda: None)

    def kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the processes of the client
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None

    def _begin(self) -> None:
        if self._process is not None:
            return
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _PROGRAM, self._kind],
            env=dict(self._environment),
            stdin=subprocess.PIPE,  # the program ends with it, and so with this process
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the server, which then puts the run aside
        )
        self.address = self._ask(open_request(self._description)).get("address")

    def _ask(
        self,
        request: list[Any],
        timeout_s: float | None = None,
        live: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """The program's answer.

        Raises:
            TrackerError: the tracker refuses, the process has died, or it does not answer.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise TrackerError(self._last_words()) from None
        line = self._answer(timeout_s or self._answer_s, live or self._live)
        if not line:
            raise TrackerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TrackerError(answer["error"])
        return answer

    def _answer(self, timeout_s: float, live: Callable[[], None]) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            live()
            if time.monotonic() > deadline:
                raise TrackerError(f"no answer within {timeout_s:.0f} s")
        return self._process.stdout.readline()

    def _last_words(self) -> str:
        """Of a process that has ended by itself."""
        assert self._process is not None
        assert self._errors is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        code = self._process.poll()
        size = os.fstat(self._errors.fileno()).st_size
        text = os.pread(
            self._errors.fileno(), _MAX_ERROR_BYTES, max(0, size - _MAX_ERROR_BYTES)
        ).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        said = f": {redact(lines[-1], self._environment)}" if lines else ""
        return f"its process ended with {code}{said}"
