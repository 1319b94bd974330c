"""How far a job is, from its events."""

import time
from dataclasses import dataclass, field
from typing import Any

from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class Progress:
    """What the metrics events of a job say, up to now. Losses are in the order of the steps."""

    step: int = 0
    total_steps: int | None = None
    tokens_per_second: float | None = None
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[float] = field(default_factory=list)
    valid_accuracy: float | None = None

    def add(self, event: FineTuningJobEvent) -> None:
        """Take in the next event."""
        metrics = metrics_of(event)
        if metrics is None:
            return
        self.step = int(_number(metrics, "step") or self.step)
        total = _number(metrics, "total_steps")
        self.total_steps = self.total_steps if total is None else int(total)
        speed = _number(metrics, "tokens_per_second")
        self.tokens_per_second = self.tokens_per_second if speed is None else speed
        if is_validation(metrics):
            self.valid_accuracy = _number(metrics, "valid_mean_token_accuracy")
        for losses, name in (
            (self.train_losses, "train_loss"),
            (self.valid_losses, "valid_loss"),
        ):
            loss = _number(metrics, name)
            if loss is not None:
                losses.append(loss)


def metrics_of(event: FineTuningJobEvent) -> dict[str, Any] | None:
    """The metrics of a metrics event, None for others."""
    return event.data if event.type == "metrics" and isinstance(event.data, dict) else None


def is_validation(metrics: dict[str, Any]) -> bool:
    """Whether the metrics are those of an evaluation."""
    return "valid_loss" in metrics


def estimated_finish(job: FineTuningJob) -> str | None:
    """When the job will be done, as a time of day, and in how long."""
    if job.estimated_finish is None:
        return None
    left = max(0, job.estimated_finish - int(time.time()))
    if left < 60:
        duration = f"{left} s"
    elif left < 3600:
        duration = f"{left // 60} min"
    else:
        duration = f"{left // 3600} h {left % 3600 // 60} min"
    at = time.strftime("%H:%M", time.localtime(job.estimated_finish))
    return f"done about {at} (in {duration})"


def _number(metrics: dict[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return value if isinstance(value, int | float) else None
