"""Any call of the scheduler's own code may raise: no request notices, and nothing is left over."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep import Pair
from random_cases import Case, cases

from flexllm_vllm.scheduler.training_loop import TrainingLoop

# Part of one job: no other one fails.
OF_A_JOB = [
    "loop.start", "loop.open_batch", "loop.close_batch", "loop.step_done", "loop.take_save",
    "loop.saved", "loop.pack_reported", "loop.serve", "loop.hold", "backward.fill",
    "forward.fill", "forward._admit", "backward.advance", "planner.started",
    "planner.report", "bounds.size", "packs.admit", "packs.finish", "rows.fits", "rows.open",
    "rows.extend", "optional.is_ready", "optional.offer", "optional.ran",
]  # fmt: skip
OF_ALL = [
    "planner.plan", "planner._plan_steps", "planner._leave_out_failed", "planner.take_failed",
    "packs.give_up_youngest", "packs.give_up", "packs._release", "planner.remove",
    "planner.job_of", "rows.close", "rows.attach", "budget.target_ms", "budget.observe",
    "feeder.take_jobs", "feeder.write",
]  # fmt: skip


def raise_at(pair: Pair, place: str, call: int) -> Callable[[], bool]:
    """Lets the ``call``-th call of a method raise; the answer tells whether it was called."""
    kind, name = place.split(".")
    count = 0

    def faulty(working: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                raise RuntimeError("injected")
            return working(*args, **kwargs)

        return method

    ours = pair.ours
    if kind == "loop":
        add = ours.planner.add

        def add_faulty(loop: TrainingLoop) -> None:
            setattr(loop, name, faulty(getattr(loop, name)))
            add(loop)

        ours.planner.add = add_faulty
    else:
        owner = {
            "planner": ours.planner,
            "backward": ours.planner.backward,
            "forward": ours.planner.forward,
            "optional": ours.planner.optional,
            "bounds": ours.planner.bounds,
            "packs": ours.planner.packs,
            "rows": ours._rows,
            "budget": ours._budget,
            "feeder": ours.feeder,
        }[kind]
        setattr(owner, name, faulty(getattr(owner, name)))
    return lambda: count >= call


@pytest.mark.parametrize("place", OF_A_JOB + OF_ALL)
def test_inference_equals_stock_whatever_raises(place: str) -> None:
    @settings(
        max_examples=6, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(case=cases(), call=st.integers(1, 40), deadlines=st.booleans())
    def check(case: Case, call: int, deadlines: bool) -> None:
        pair = Pair(case, deadlines=deadlines or place.startswith("optional."))
        raised = raise_at(pair, place, call)
        pair.run_whatever_raises()
        errors = pair.ours.feeder.journal.errors.values()
        injected = sum("injected" in str(error) for error in errors)
        if place in OF_A_JOB:
            assert injected == raised()

    check()
