"""Shows a running job: a live bar in a terminal, a line every few seconds elsewhere."""

import time
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo.load import BackgroundLoad

POLL = 0.5  # seconds
PLAIN_INTERVAL = 5.0  # seconds between lines where there is no terminal


def follow(client: OpenAI, job_id: str, load: BackgroundLoad, console: Console) -> Any:
    """Returns the job once it has ended."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  {task.fields[status]}"),
        TimeElapsedColumn(),
    )
    printed = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=None, status="queued")
        while True:
            job = client.fine_tuning.jobs.retrieve(job_id)
            metrics = _latest_metrics(client, job_id)
            if metrics:
                status = _status(metrics, load)
                progress.update(
                    task, completed=metrics["step"], total=metrics["total_steps"], status=status
                )
                due = time.monotonic() - printed > PLAIN_INTERVAL or job.status == "succeeded"
                if not console.is_terminal and due:
                    printed = time.monotonic()
                    console.print(f"step {metrics['step']}/{metrics['total_steps']}  {status}")
            if job.status in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(POLL)


def _latest_metrics(client: OpenAI, job_id: str) -> dict[str, Any] | None:
    for event in client.fine_tuning.jobs.list_events(job_id, limit=5).data:
        if event.type == "metrics":
            return event.data  # type: ignore[return-value]
    return None


def _status(metrics: dict[str, Any], load: BackgroundLoad) -> str:
    return (
        f"loss {metrics['train_loss']:.3f}  {metrics['tokens_per_second']:.0f} tokens/s  |  "
        f"{load.requests} requests served meanwhile, TPOT {load.tpot_ms:.0f} ms"
    )
