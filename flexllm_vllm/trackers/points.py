"""A job's metrics as trackers have them: tags in groups, a value for each step."""

import math
from dataclasses import dataclass
from typing import Any

_NAMES = {
    "train_loss": "train/loss",
    "train_mean_token_accuracy": "train/token_accuracy",
    "valid_loss": "valid/loss",
    "valid_mean_token_accuracy": "valid/token_accuracy",
}
_NO_METRICS = ("step", "total_steps")


@dataclass(frozen=True)
class MetricPoint:
    """What one metrics event holds.

    Attributes:
        step: optimizer step, from 1.
        time: Unix time in seconds.
        values: finite numbers by tag, such as ``train/loss``.
    """

    step: int
    time: float
    values: dict[str, float]


def metric_point(data: dict[str, Any], time: float) -> MetricPoint:
    """The point of a metrics event's ``data``. A loss that diverged is left out."""
    values = {
        _NAMES.get(name, f"train/{name}"): float(value)
        for name, value in data.items()
        if name not in _NO_METRICS and _is_finite_number(value)
    }
    return MetricPoint(int(data["step"]), time, values)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
