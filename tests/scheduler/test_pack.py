"""Windows of the loss head: rows without loss cost nothing."""

from types import SimpleNamespace

import pytest

from flexllm_vllm.plan import StepPlan
from flexllm_vllm.scheduler.backward_windows import BackwardWindows, ModelShape, WindowBounds
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.optional_windows import OptionalWindows
from flexllm_vllm.scheduler.pack import Pack, Sequence

# Losses at rows 3, 4, 5 of the first sequence, and at 6 + 1 of the second.
PACK = Pack(
    "job",
    [
        Sequence.of(list(range(10, 17)), [0, 0, 0, 0, 1, 1, 1]),
        Sequence.of([20, 21, 22], [0, 0, 1]),
    ],
)


@pytest.mark.parametrize(
    ("num_losses", "end", "rows"),
    [(1, 8, 2), (2, 8, 3), (4, 8, 8), (9, 8, 8), (1, 4, 4), (1, 3, 3)],
)
def test_rows_without_loss_come_with_those_that_have_it(
    num_losses: int, end: int, rows: int
) -> None:
    assert PACK.losses == [0, 0, 0, 0, 1, 2, 3, 3, 4]
    assert PACK.rows_with(num_losses, end) == rows


@pytest.mark.parametrize(("end", "start"), [(8, 6), (6, 0), (5, 0), (7, 6), (3, 0)])
def test_rows_with_loss_come_with_those_before_them_that_have_none(end: int, start: int) -> None:
    assert PACK.losses == [0, 0, 0, 0, 1, 2, 3, 3, 4]
    assert PACK.run_with_loss(end) == start


def test_a_window_of_the_loss_head_costs_what_its_losses_cost() -> None:
    PACK.layers = (2, 0)
    PACK.begin_backward()
    windows = BackwardWindows(ModelShape(2, 10.0), SimpleNamespace(), WindowBounds(least=4))
    loop = SimpleNamespace(batch=SimpleNamespace(packs=[PACK]), serve=lambda tokens: None)
    # A token costs 1 in a layer, 10 in the head: two losses fit, and the row between them is free.
    budget = Budget(total=25.0, forward=1.0, backward=2.0, max_tokens=100)
    plan = StepPlan()
    assert windows.fill(loop, 25.0, budget, plan) == 20.0
    (window,) = plan.backward
    assert (window.start, window.end, window.num_token_layers) == (5, 8, 2)


def test_what_is_offered_of_the_loss_head_ends_with_the_rows_that_cost_something() -> None:
    masks = [0] * 20 + [1] * 40 + [0] * 30 + [1, 0] * 10 + [0] * 5 + [1] * 3
    sequence = Sequence.of(list(range(len(masks))), masks)
    pack = Pack("job", [sequence])
    pack.layers = (2, 2)
    pack.begin_backward()
    bounds = WindowBounds(least=8)
    backward = BackwardWindows(ModelShape(2, 10.0), SimpleNamespace(), bounds)
    offered = OptionalWindows(ModelShape(2, 10.0), backward, bounds)
    loop = SimpleNamespace(batch=SimpleNamespace(packs=[pack]))
    plan = StepPlan()
    budget = Budget(total=0.0, forward=1.0, backward=2.0, max_tokens=100, window=3.0)
    offered.offer(loop, 1e9, budget, plan)
    end, costly = pack.num_rows, 0
    for window, fixed_ms, row_ms, least in plan.optional:
        assert window.end == end
        assert (fixed_ms, row_ms) == (3.0, 10.0)
        rows = range(window.end - (window.num_costly or 0), window.end)
        may_be_cut = least < (window.num_costly or 0)
        assert not may_be_cut or all(sequence.targets[row] >= 0 for row in rows)
        end, costly = window.start, costly + (window.num_costly or 0)
    assert (end, costly) == (0, 53)
    assert len(plan.optional) < 8
