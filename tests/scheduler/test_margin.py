"""The margin: as many iterations are late as may be."""

import random

import pytest

from flexllm_vllm.scheduler.margin import LATE_SHARE, MAX_MARGIN, Margin

TARGET_MS = 100.0


def late_share(
    filled: float, spread: float, unavoidable: float = 0.0, margin: Margin | None = None
) -> float:
    """Of iterations that fill a part of what the margin leaves, on a machine with some noise."""
    rng, margin = random.Random(0), margin or Margin()
    late = []
    for _ in range(40_000):
        noise = rng.lognormvariate(0.0, spread)
        duration_ms = filled * TARGET_MS / margin.value * noise
        prompt = rng.random() < unavoidable
        if prompt:  # finetuning has no room beside it
            duration_ms = 2 * TARGET_MS
        else:
            margin.learn(noise)
        late.append(duration_ms > TARGET_MS)
        margin.was_late(late[-1], has_finetuning=not prompt)
    return sum(late[10_000:]) / 30_000


@pytest.mark.parametrize(
    ("filled", "unavoidable"),
    [
        (1.0, 0.0),
        (0.98, 0.0),  # parts of an iteration do not fill it
        (1.0, 0.005),
    ],
)
def test_as_many_iterations_are_late_as_may_be(filled: float, unavoidable: float) -> None:
    assert late_share(filled, 0.1, unavoidable) == pytest.approx(LATE_SHARE, rel=0.3)


def test_what_it_cannot_change_does_not_end_the_finetuning() -> None:
    margin = Margin()
    assert late_share(1.0, 0.1, unavoidable=0.05, margin=margin) < 0.055
    assert 1.25 < margin.value < 1.35  # the noise's 998th of 1000 is 1.33


def test_a_stalling_machine_does_not_end_the_finetuning() -> None:
    margin = Margin()
    for _ in range(1000):
        margin.learn(30.0)
        margin.was_late(True)
    assert margin.value == MAX_MARGIN
