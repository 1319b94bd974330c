"""What waits for what between the forward's stream and that of the finetuning work.

Streams are replaced by logical clocks: an operation knows which ones were complete before it began.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexllm_vllm.plan import ForwardWindow, StepPlan
from flexllm_vllm.worker.mixin import FinetuningWorkerMixin
from flexllm_vllm.worker.side_stream import SideStream


class Stream:
    """Operations given to it are complete before its next one begins."""

    def __init__(self, *_: Any) -> None:
        self.complete: set[str] = set()

    def run(self, name: str) -> None:
        seen[name] = set(self.complete)
        self.complete.add(name)

    def wait_stream(self, other: "Stream") -> None:
        self.complete |= other.complete

    def wait_event(self, event: "Event") -> None:
        self.complete |= event.complete


class Event:
    def record(self, stream: Stream) -> None:
        self.complete = set(stream.complete)


seen: dict[str, set[str]] = {}


class Runner:
    """vLLM's worker: its forward runs on the current stream."""

    def execute_model(self, output: Any) -> None:
        self._before_forward()  # type: ignore[attr-defined]
        torch.cuda.current_stream().run(f"forward {output.number}")  # type: ignore[attr-defined]


class Worker(FinetuningWorkerMixin, Runner):  # type: ignore[misc]
    def __init__(self) -> None:
        self._side = SideStream(torch.device("meta"))
        self._batch_order = list
        self.number = 0
        self._trainer: Any = SimpleNamespace(
            saver=SimpleNamespace(is_busy=False),
            run=lambda plan: self._on_current("work"),
            begin_forward=lambda *_: self._on_current("begin"),
            end_forward=lambda: None,
        )

    def _on_current(self, name: str) -> None:
        torch.cuda.current_stream().run(f"{name} {self.number}")  # type: ignore[attr-defined]

    def step(self, plan: StepPlan | None) -> None:
        self.number += 1
        self._plan = None
        self.execute_model(
            SimpleNamespace(
                finetuning=plan,
                number=self.number,
                total_num_scheduled_tokens=1,
                num_scheduled_tokens={},
            )
        )


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    current = [Stream()]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    seen.clear()
    return Worker()


WINDOW = ForwardWindow(0, "row", 0, 1, [])


def test_the_forward_waits_for_what_it_needs_and_for_no_more(worker: Worker) -> None:
    rng = random.Random(0)
    plans: list[str] = ["none"]
    for _ in range(300):
        kind = rng.choice(["none", "backward", "forward"])
        plans.append(kind)
        end = ["job"]  # some work
        worker.step({"none": None, "backward": StepPlan(end=end),
                     "forward": StepPlan(end=end, forward=[WINDOW])}[kind])  # fmt: skip
    works = [i for i, kind in enumerate(plans) if kind != "none"]
    for i in range(1, len(plans)):
        before = seen[f"forward {i}"]
        assert {f"work {j}" for j in works if j < i} <= before
        if plans[i] == "forward":
            assert f"work {i}" in before
        # A forward without finetuning rows goes beside the work of its iteration.
        if plans[i] == "backward":
            assert f"work {i}" not in before
    for i in works:
        before = seen[f"work {i}"]
        assert {f"forward {j}" for j in range(1, i)} <= before
        assert {f"begin {j}" for j in works if j < i and plans[j] == "forward"} <= before


def test_what_the_forward_is_told_of_is_the_works_own(worker: Worker) -> None:
    worker.step(StepPlan(forward=[WINDOW]))
    assert "begin 1" not in seen["forward 1"]
    assert "begin 1" in worker._side._stream.complete  # type: ignore[union-attr,attr-defined]
