import pytest
import torch
from transformers import get_scheduler

from flexllm_vllm.scheduler.learning_rate import learning_rate


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "ratio"), [(20, 0.1), (7, 0.0), (13, 0.25), (1, 0.03)])
def test_every_step_has_the_rate_of_transformers(kind: str, steps: int, ratio: float) -> None:
    import math

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_scheduler(kind, optimizer, math.ceil(steps * ratio), steps)
    for step in range(steps):
        expected = schedule.get_last_lr()[0]
        assert learning_rate(kind, 0.5, step, steps, ratio) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="polynomial"):
        learning_rate("polynomial", 1.0, 0, 1, 0.0)
