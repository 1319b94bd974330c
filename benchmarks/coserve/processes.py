"""Child processes that stop, go on and end together with their descendants."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_started: list["ProcessGroup"] = []


class ProcessGroup:
    """A command in a process group of its own.

    Args:
        command: program and arguments.
        log: file that its output is appended to.
        environment: of the process.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self.id = self._process.pid
        _started.append(self)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status; None while it lives."""
        return self._process.poll()

    def check(self) -> None:
        """Raises if the process has ended."""
        if not self.alive:
            text = self.log.read_text()
            causes = [line for line in text.splitlines() if "Error: " in line][:5]
            shown = "\n".join([*causes, text[-2000:]])
            raise RuntimeError(f"{self.log.stem} died, see {self.log}:\n{shown}")

    def pause(self) -> None:
        """It gets no core from now on; its memory stays."""
        os.killpg(self.id, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.id, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Processor time of its living processes, all threads, in seconds."""
        return group_cpu_seconds(self.id)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.alive

    def end(self, seconds: float = 0.0) -> None:
        """SIGTERM to the process if it is given seconds for it, then SIGKILL to the group."""
        if seconds > 0 and self.alive:
            self.resume()
            self._process.terminate()
            self.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.id, signal.SIGKILL)
        self._process.wait(30)
        if self in _started:
            _started.remove(self)


@contextlib.contextmanager
def ended_on_exit() -> Iterator[None]:
    """Ends every process group when the block is left, be it by SIGTERM or Ctrl-C."""

    def leave(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for group in list(_started):
            group.end()
        signal.signal(signal.SIGTERM, before)


def group_cpu_seconds(group: int) -> float:
    """Processor time that the living processes of a group have used, all threads, in seconds."""
    ticks = 0
    for task in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
