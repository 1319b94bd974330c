"""Three ways to show a job that is followed."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexllm_vllm.commandline.output import Output, local_time, printable
from flexllm_vllm.commandline.progress import (
    ENDED,
    Progress,
    estimated_finish,
    is_validation,
    metrics_of,
)
from flexllm_vllm.commandline.sparkline import sparkline

PLAIN_INTERVAL = 5.0  # seconds between two lines about steps
_LEVEL_STYLES = {"warn": "yellow", "error": "red"}


class JobView(Protocol):
    """Shows a job; a context manager around the whole time that it is followed."""

    def update(self, job: FineTuningJob, events: Sequence[FineTuningJobEvent]) -> None:
        """The job's state, and the events since the last call in the order of time."""

    def notice(self, text: str) -> None:
        """Something about the connection."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _Lines:
    """A view that writes lines and holds nothing open."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def notice(self, text: str) -> None:
        """On the standard error: the lines of the result stay whole."""
        self._output.note(text, style="yellow")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class JsonView(_Lines):
    """JSON lines: every event and, if ``jobs``, the job before the first and after the last."""

    def __init__(self, output: Output, jobs: bool) -> None:
        super().__init__(output)
        self._jobs = jobs
        self._started = False

    def update(self, job: FineTuningJob, events: Sequence[FineTuningJobEvent]) -> None:
        """See :class:`JobView`."""
        if self._jobs and not self._started:
            self._output.json_line(job)
        self._started = True
        for event in events:
            self._output.json_line(event)
        if self._jobs and job.status in ENDED:
            self._output.json_line(job)


class PlainView(_Lines):
    """A line for each event; of the steps one each ``interval`` seconds, and always the last."""

    def __init__(self, output: Output, interval: float = 0) -> None:
        super().__init__(output)
        self._interval = interval
        self._shown = -interval
        self._held: FineTuningJobEvent | None = None

    def update(self, job: FineTuningJob, events: Sequence[FineTuningJobEvent]) -> None:
        """See :class:`JobView`."""
        for event in events:
            metrics = metrics_of(event)
            if metrics is None or is_validation(metrics):
                self._show_held()
                self._output.text(event_line(event))
            elif self._interval:
                self._held = event
            else:
                self._output.text(event_line(event))
        if job.status in ENDED or time.monotonic() - self._shown >= self._interval:
            self._show_held()

    def _show_held(self) -> None:
        if self._held is not None:
            self._output.text(event_line(self._held))
            self._held = None
            self._shown = time.monotonic()


class LiveView:
    """In a terminal: the events' messages, and below them a bar and the losses, redrawn."""

    def __init__(self, output: Output) -> None:
        self._console = output.console
        self._progress = Progress()
        self._live = Live(console=self._console, auto_refresh=False)

    def update(self, job: FineTuningJob, events: Sequence[FineTuningJobEvent]) -> None:
        """See :class:`JobView`."""
        for event in events:
            self._progress.add(event)
            if metrics_of(event) is None:
                line = Text(event_line(event), style=_LEVEL_STYLES.get(event.level, ""))
                self._console.print(line)
        width, ascii_only = self._console.width, self._console.options.ascii_only
        self._live.update(progress_panel(job, self._progress, width, ascii_only), refresh=True)

    def notice(self, text: str) -> None:
        """Above the bar."""
        self._console.print(Text(printable(text), style="yellow"))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()


def event_line(event: FineTuningJobEvent) -> str:
    """Time, level unless it is the usual one, message, speed."""
    level = "" if event.level == "info" else f"{event.level}: "
    line = f"{local_time(event.created_at)}  {level}{event.message}"
    speed = (metrics_of(event) or {}).get("tokens_per_second")
    if isinstance(speed, int | float):
        line += f" ({speed:,.0f} tokens/s)"
    return printable(line)


def progress_panel(
    job: FineTuningJob, progress: Progress, width: int, ascii_only: bool
) -> RenderableType:
    """A bar and, once there are losses, a curve of each kind; ``width`` in columns."""
    bar = Table.grid(padding=(0, 2))
    total = progress.total_steps
    cells: list[RenderableType] = [
        Text(printable(job.status), style="bold"),
        ProgressBar(total=total or 1, completed=progress.step, width=max(10, min(40, width // 4))),
    ]
    if total is not None:
        cells.append(Text(f"{progress.step}/{total}"))
    if progress.tokens_per_second is not None and job.status not in ENDED:
        cells.append(Text(f"{progress.tokens_per_second:,.0f} tokens/s"))
    finish = estimated_finish(job)
    if finish is not None:
        cells.append(Text(finish, style="dim"))
    bar.add_row(*cells)
    lines: list[RenderableType] = [bar]
    curve_width = max(10, min(60, width - 40))
    for name, losses, note in (
        ("train loss", progress.train_losses, ""),
        ("valid loss", progress.valid_losses, _accuracy(progress)),
    ):
        if losses:
            curve = sparkline(losses, curve_width, ascii_only)
            lines.append(
                Text.assemble(f"{name}  {losses[-1]:<8.4f}  ", (curve, "cyan"), f"  {note}")
            )
    return Group(*lines)


def _accuracy(progress: Progress) -> str:
    accuracy = progress.valid_accuracy
    return "" if accuracy is None else f"accuracy {accuracy:.1%}"
