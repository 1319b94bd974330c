"""The planner over whole jobs, with KV blocks but without an engine."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexllm_vllm.data.dataset import DatasetBuilder
from flexllm_vllm.jobs.types import FinetuningJob, JobStatus, LoraSpec, TrainingSpec
from flexllm_vllm.plan import AdapterLayout, ForwardWindow, PackResult, StepPlan
from flexllm_vllm.scheduler.backward_windows import ModelShape
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.pack import Pack, Sequence
from flexllm_vllm.scheduler.pages import PagePool
from flexllm_vllm.scheduler.planner import Planner
from flexllm_vllm.scheduler.training_loop import TrainingLoop

LAYERS = 4
LAYOUT = AdapterLayout(tokens_per_page=8, num_pages=32, lowest_layer=0, score_tokens_per_page=64)


class Rows:
    """KV blocks of the real size, counted rather than allocated (see ``HiddenRows``)."""

    def __init__(self, num_blocks: int = 64, block_size: int = 16, max_rows: int = 16) -> None:
        self.num_blocks, self.block_size, self.max_rows = num_blocks, block_size, max_rows
        self.held: dict[int, int] = {}
        self.num_rows = 0

    def _free(self) -> int:
        return self.num_blocks - sum(self.held.values())

    def fits(self, pack: Pack, promised: int) -> bool:
        return pack.num_blocks(self.block_size) <= self._free() - promised

    def open(self, pack: Pack, lora: Any) -> None:
        for i, sequence in enumerate(pack.sequences):
            sequence.request = SimpleNamespace(request_id=f"{pack.pack_id}-{i}")  # type: ignore

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        blocks = -(-(sequence.done + num_tokens) // self.block_size)
        if blocks - self.held.get(id(sequence), 0) > self._free():
            return False
        self.held[id(sequence)] = blocks
        self.num_rows += 1
        return True

    def window(self, pack: Pack, sequence: Sequence, num_tokens: int) -> ForwardWindow:
        assert sequence.request is not None
        row_id, end = sequence.request.request_id, sequence.done + num_tokens
        return ForwardWindow(pack.pack_id, row_id, sequence.done, end, [])

    def close(self, pack: Pack) -> None:
        for sequence in pack.sequences:
            self.held.pop(id(sequence), None)
            sequence.request = None

    def discard(self) -> None:
        self.num_rows = 0


def make_loop(planner: Planner, name: str, lengths: list[int], tmp_path: Path,
              batch_size: int = 4, n_epochs: int = 2,
              layout: AdapterLayout | None = LAYOUT,
              weight: float = 1.0) -> TrainingLoop:  # fmt: skip
    builder = DatasetBuilder()
    rng = np.random.default_rng(len(lengths))
    for length in lengths:
        builder.add(rng.integers(3, 99, length).tolist(), [0] + [1] * (length - 1))
    training = TrainingSpec(
        batch_size=batch_size, max_seq_length=512, seed=0, n_epochs=n_epochs,
        scheduling_weight=weight,
    )  # fmt: skip
    job = FinetuningJob(
        id=name, model="m", status=JobStatus.RUNNING, training_file="f", suffix=None,
        lora=LoraSpec(), training=training, hyperparameters={}, created_at=0, started_at=0,
        finished_at=None, trained_tokens=0, step=0, total_steps=0, adapter_name=name,
        fine_tuned_model=None, adapter_int_id=1, init_adapter_path=None, folder=tmp_path,
        error=None, cancel_requested=False, attempts=1, organization_id="local",
    )  # fmt: skip
    loop = TrainingLoop(job, builder.build(), planner.make_packs, "base")
    planner.add(loop)
    if layout is not None:
        planner.started(name, layout)
    return loop


class Worker:
    """Checks plans as a worker would have to obey them."""

    def __init__(self, planner: Planner, rows: Rows, lowest_layer: int = 0) -> None:
        self.planner, self.rows, self.lowest_layer = planner, rows, lowest_layer
        self.open: dict[int, Any] = {}
        self.forwarded: dict[int, list[int]] = {}
        self.at: dict[int, tuple[int, int]] = {}
        self.finished = 0
        self.steps: dict[str, int] = {}
        self.saved: list[str] = []

    def run(self, tokens: int) -> StepPlan:
        self.rows.discard()
        plan = self.planner.plan(Budget.of_tokens(tokens))
        for pack_id in plan.drop:
            for state in (self.open, self.forwarded, self.at):
                state.pop(pack_id, None)
        before = dict(self.open)
        for spec in plan.open:
            assert spec.pack_id not in self.open
            self.open[spec.pack_id] = spec
            self.forwarded[spec.pack_id] = [0] * len(spec.sequences)
            self.at[spec.pack_id] = (LAYERS, spec.num_rows)
        for window in (part for whole in plan.backward for part in whole.each_layer()):
            spec = before[window.pack_id]  # its forward was complete an iteration ago
            done = [len(s.targets) for s in spec.sequences]
            assert self.forwarded[window.pack_id] == done
            layer, row = self.at[window.pack_id]
            assert (window.layer, window.end) == (layer, row)
            assert 0 <= window.start < window.end
            following = (layer, window.start) if window.start else (layer - 1, spec.num_rows)
            self.at[window.pack_id] = following
            if window.layer == LAYERS and window.start == 0:
                self.planner.report(window.pack_id, PackResult(1.0))
            if following[0] < self.lowest_layer:
                del self.open[window.pack_id]
                self.finished += len(spec.sequences)
        for window in plan.forward:
            index = int(window.row_id.split("-")[1])
            assert self.forwarded[window.pack_id][index] == window.start
            self.forwarded[window.pack_id][index] = window.end
        held = [page for spec in self.open.values() for page in spec.pages]
        assert len(held) == len(set(held)) <= LAYOUT.num_pages
        for spec in self.open.values():
            assert len(spec.pages) == -(-spec.num_rows // LAYOUT.tokens_per_page)
        for step in plan.optimize:
            self.steps[step.job_id] = self.steps.get(step.job_id, 0) + 1
            self.planner.loops[step.job_id].step_done(1.0)
        for save in plan.save:
            self.planner.loops[save.job_id].saved()
        self.saved = [name for name, loop in self.planner.loops.items() if loop.has_ended]
        forward = sum(w.end - w.start for w in plan.forward)
        assert forward <= tokens
        assert self.rows.num_rows <= self.rows.max_rows
        return plan


def make(**rows: int) -> tuple[Planner, Rows, Worker]:
    made = Rows(**rows)
    planner = Planner(ModelShape(LAYERS, 2.0), made)  # type: ignore[arg-type]
    return planner, made, Worker(planner, made)


@pytest.mark.parametrize("tokens", [16, 33, 100, 1000])
@pytest.mark.parametrize("num_pages", [14, 32])
def test_every_sequence_runs_forward_and_backward_once_an_epoch(
    tokens: int, num_pages: int, tmp_path: Path
) -> None:
    planner, rows, worker = make()
    layout = replace(LAYOUT, num_pages=num_pages)
    loop = make_loop(planner, "a", [5, 100, 33, 64, 17, 80, 2, 50, 9], tmp_path, layout=layout)
    for _ in range(5000):
        worker.run(tokens)
        if worker.saved:
            break
    assert worker.saved == ["a"]
    assert worker.finished == 2 * 9
    assert worker.steps["a"] == loop.total_steps == 6
    assert not rows.held
    assert not worker.open


def test_an_iteration_holds_forward_and_backward_windows(tmp_path: Path) -> None:
    planner, _, worker = make()
    make_loop(planner, "a", [60] * 12, tmp_path, batch_size=12)
    plans = [worker.run(40) for _ in range(30)]
    assert any(p.forward and p.backward for p in plans)


def test_a_dropped_pack_is_redone_whole_under_a_new_id(tmp_path: Path) -> None:
    planner, rows, worker = make()
    make_loop(planner, "a", [60, 70, 40, 90], tmp_path, n_epochs=1)
    dropped = 0
    for i in range(2000):
        if i % 7 == 6 and dropped < 20:
            dropped += planner.packs.give_up_youngest()
        worker.run(16)
        if worker.saved:
            break
    assert dropped == 20  # more than the job would have needed iterations without them
    assert worker.finished == 4
    assert worker.steps["a"] == 1
    assert not rows.held


def test_two_jobs_take_turns(tmp_path: Path) -> None:
    planner, _, worker = make()
    for name in ("a", "b"):
        make_loop(planner, name, [40] * 16, tmp_path, n_epochs=3)
    for _ in range(100):
        worker.run(32)
        counts = [worker.steps.get(name, 0) for name in ("a", "b")]
        assert abs(counts[0] - counts[1]) <= 1
    assert min(counts) > 0


def test_a_job_of_twice_the_weight_gets_twice_the_steps(tmp_path: Path) -> None:
    planner, _, worker = make()
    make_loop(planner, "a", [40] * 64, tmp_path, n_epochs=9)
    make_loop(planner, "b", [40] * 64, tmp_path, n_epochs=9, weight=2.0)
    for _ in range(300):
        worker.run(32)
    assert worker.steps["b"] == pytest.approx(2 * worker.steps["a"], rel=0.1)


def test_a_job_with_long_examples_is_not_starved_by_many_with_short_ones(tmp_path: Path) -> None:
    """Its packs need 13 of 14 pages, those of the others 2 each, and never end together."""
    planner, _, worker = make()
    layout = replace(LAYOUT, num_pages=14)
    make_loop(planner, "long", [105] * 40, tmp_path, batch_size=1, layout=layout)
    for i in range(4):
        lengths = [17] * (300 + i)
        make_loop(planner, f"short-{i}", lengths, tmp_path, batch_size=1, layout=layout)
    for _ in range(600):
        worker.run(8)
    tokens = {name: loop.service for name, loop in planner.loops.items()}
    # Until one of its packs has run, 105 tokens, the others wait.
    assert tokens["long"] > 0
    assert max(tokens.values()) - min(tokens.values()) <= 2 * 105


def test_a_removed_job_gives_everything_back(tmp_path: Path) -> None:
    planner, rows, worker = make()
    make_loop(planner, "a", [60, 70, 40, 90], tmp_path)
    for _ in range(5):
        worker.run(48)
    assert rows.held
    planner.remove("a")
    assert not rows.held
    plan = planner.plan(Budget.of_tokens(48))
    assert plan.end == ["a"]
    assert not planner.has_work


def test_an_example_that_can_never_run_is_refused(tmp_path: Path) -> None:
    planner, _, worker = make()
    make_loop(planner, "a", [10, 80], tmp_path, layout=None)
    assert not worker.run(64).forward  # nothing is known of the worker's adapter yet
    with pytest.raises(ValueError, match="longest example has 80 tokens"):
        planner.started("a", replace(LAYOUT, num_pages=8))


def test_the_backward_ends_with_the_lowest_layer_that_has_matrices(tmp_path: Path) -> None:
    planner, _, worker = make()
    worker.lowest_layer = 2
    make_loop(planner, "a", [20] * 4, tmp_path, layout=replace(LAYOUT, lowest_layer=2))
    lowest = LAYERS
    for _ in range(100):
        plan = worker.run(64)
        lowest = min([lowest, *(w.lowest for w in plan.backward)])
        if worker.saved:
            break
    assert worker.saved == ["a"]
    assert lowest == 2
    assert worker.finished == 8


def test_nothing_is_planned_without_a_budget(tmp_path: Path) -> None:
    planner, _, worker = make()
    make_loop(planner, "a", [20] * 4, tmp_path)
    worker.run(0)
    plan = worker.run(0)
    assert not plan.forward
    assert not plan.backward


def test_pages_are_handed_out_once() -> None:
    pool = PagePool(10)
    first, second = pool.take(4), pool.take(6)
    assert sorted(first + second) == list(range(10))
    pool.give_back(first)
    assert pool.num_free == 4
    assert pool.take(4) == first


def test_rows_of_a_sequence_end_with_its_last_target() -> None:
    sequence = Sequence.of([11, 12, 13, 14, 15], [0, 0, 1, 1, 0])
    assert sequence.targets == (-1, 13, 14)
    assert sequence.token_ids == [11, 12, 13, 14]  # the last one is never computed


@pytest.mark.parametrize(
    "part", ["open_batch", "close_batch", "take_save", "preference_of", "start"]
)
def test_a_job_whose_planning_fails_leaves_the_others_alone(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, rows, worker = make()
    bad = make_loop(planner, "bad", [40] * 8, tmp_path, n_epochs=2)
    make_loop(planner, "good", [40] * 8, tmp_path, n_epochs=2)
    work = getattr(TrainingLoop, part)
    calls = 0

    def broken(self: TrainingLoop, *arguments: Any) -> Any:
        nonlocal calls
        calls += self is bad
        if self is bad and calls == (1 if part in ("start", "close_batch") else 3):
            raise RuntimeError("injected")
        return work(self, *arguments)

    monkeypatch.setattr(TrainingLoop, part, broken)
    failed: dict[str, Exception] = {}
    for _ in range(2000):
        worker.run(48)
        failed |= planner.take_failed()
        if worker.saved:
            break
    assert str(failed["bad"]) == "injected"
    assert worker.saved == ["good"]
    assert worker.steps["good"] == 4
    assert not rows.held
    assert planner.packs.pages.num_free == planner.packs.pages.num_pages


def test_layers_that_fit_whole_are_one_window(tmp_path: Path) -> None:
    """All layers of a pack where there is room for them; as many as fit where there is less."""
    planner, _, worker = make()
    make_loop(planner, "a", [20] * 4, tmp_path)
    found = []
    for _ in range(20):
        found += worker.run(10_000).backward
    decoder = [w for w in found if w.layer < LAYERS]
    assert {(w.layer, w.lowest, w.start) for w in decoder} == {(LAYERS - 1, 0, 0)}

    make_loop(planner, "b", [20] * 4, tmp_path)
    plans = [worker.run(100) for _ in range(60)]
    counts = {w.num_layers for plan in plans for w in plan.backward}
    assert 1 in counts
    assert counts & set(range(2, LAYERS))


def test_windows_begin_at_multiples_of_the_smallest(tmp_path: Path) -> None:
    planner = Planner(ModelShape(LAYERS, 2.0), Rows())
    make_loop(planner, "a", [110], tmp_path, batch_size=1, n_epochs=1)
    planner.plan(Budget.of_tokens(200))
    windows = []
    for _ in range(40):
        windows += planner.plan(Budget.of_tokens(10)).backward
    cut = [w for w in windows if w.layer < LAYERS and w.start]
    assert cut
    assert all(w.start % planner.bounds.least == 0 for w in cut)


def test_packs_are_smaller_beside_requests(tmp_path: Path) -> None:
    sizes = {}
    for deadline_ms in (None, 100.0):
        planner = Planner(ModelShape(LAYERS, 2.0), Rows())
        layout = replace(LAYOUT, num_pages=1024)
        make_loop(planner, "a", [120] * 4, tmp_path, n_epochs=1, layout=layout)
        budget = replace(Budget.of_tokens(1000), firm=1000.0, deadline_ms=deadline_ms)
        sizes[deadline_ms] = [pack.num_rows for pack in planner.plan(budget).open]
    assert sizes == {None: [4 * 119], 100.0: [2 * 119] * 2}


@pytest.mark.parametrize(("firm", "has_forward"), [(11.0, False), (15.0, True)])
def test_a_forward_goes_with_the_backward_beside_requests(
    firm: float, has_forward: bool, tmp_path: Path
) -> None:
    planner = Planner(ModelShape(LAYERS, 2.0), Rows())
    layout = replace(LAYOUT, num_pages=1024)
    make_loop(planner, "a", [120] * 4, tmp_path, n_epochs=1, layout=layout)
    budget = replace(Budget.of_tokens(238), firm=238.0, deadline_ms=300.0)
    planner.plan(budget)  # the forward of the first of two packs
    plan = planner.plan(replace(budget, firm=firm, rows=10.0))
    assert plan.optional
    assert bool(plan.forward) is has_forward


def test_beside_requests_the_shortest_pack_comes_first(tmp_path: Path) -> None:
    planner = Planner(ModelShape(LAYERS, 2.0), Rows())
    layout = replace(LAYOUT, num_pages=1024)
    lengths = [231, 201, 101, 191, 221, 161]
    loop = make_loop(planner, "a", lengths, tmp_path, batch_size=6, n_epochs=1, layout=layout)
    planner.plan(replace(Budget.of_tokens(16), firm=16.0, deadline_ms=100.0))
    assert loop.batch is not None
    first, *others = (pack.num_rows for pack in loop.batch.packs)
    assert first == 100
    assert sorted(others) == [160, 190, 200, 220, 230]
