"""Learning-rate schedules, equal to ``transformers.get_scheduler`` step by step."""

import math


def learning_rate(
    kind: str, base: float, step: int, total_steps: int, warmup_ratio: float
) -> float:
    """Learning rate of the optimizer step with this index.

    Args:
        kind: ``constant`` (knows no warm-up, as in transformers), ``linear`` or ``cosine``.
        base: the peak.
        step: steps done before this one.
        total_steps: of the job.
        warmup_ratio: share of the steps that ramp up from zero, rounded up to whole steps.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "constant":
        return base
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return base * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if kind == "linear":
        return base * max(0.0, 1.0 - progress)
    if kind == "cosine":
        return base * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"unknown lr_scheduler_type {kind!r}")
