"""Our scheduler and stock vLLM's, with the same requests and the same sampled tokens."""

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from checked_worker import CheckedWorker
from random_cases import LAYERS, Case, SomeJob
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from benchmarks.simulate.configuration import make_scheduler
from benchmarks.simulate.engine import make_request
from benchmarks.simulate.jobs import make_job
from benchmarks.simulate.machine import Machine
from benchmarks.simulate.scheduler import AsyncSimulatedScheduler, SimulatedScheduler
from flexllm_vllm.jobs.types import JobStatus
from flexllm_vllm.plan import StepPlan
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.latency_model import IterationWork
from flexllm_vllm.scheduler.training_loop import EPOCHS_SAVED


class DeadlineScheduler(SimulatedScheduler):
    """Its worker ends the backward beside requests when it is time."""

    has_deadlines = True


@dataclass
class Pair:
    """Our scheduler and, without ``alone``, stock vLLM's in lock-step.

    ``ahead``: iterations that are scheduled, and run, before the results of one are taken in.
    ``deadlines``: whether the worker ends the backward beside requests when it is time.
    """

    case: Case
    alone: bool = False
    ahead: int = 0
    deadlines: bool = False
    now: float = 0.0
    iterations: int = 0
    spent: float = 0.0
    stock: Scheduler | None = None
    in_flight: deque[tuple[Any, Any, Any, Any]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        case = self.case
        ours = AsyncSimulatedScheduler if self.ahead else SimulatedScheduler
        if self.deadlines:
            ours = DeadlineScheduler
        self.ours = make_scheduler(ours, case.spec, clock=lambda: self.now)
        self.ours._rows.max_rows = case.max_rows
        if case.budgets:
            self.ours._budget.budget = self._some_budget  # type: ignore[method-assign]
        if not self.alone:
            self.stock = make_scheduler(AsyncScheduler if self.ahead else Scheduler, case.spec)
        shape = self.ours.planner.shape
        self.worker = CheckedWorker(
            LAYERS,
            shape.loss_head_layers,
            case.layout,
            case.blocks + 1,
            case.block_size,
            self._later,
        )
        self.random = random.Random(0)
        self.machine = Machine(noise=0.1, stalls=0.02)
        self.hasher = None
        if case.prefix_caching:
            init_none_hash(sha256)
            self.hasher = get_request_block_hasher(case.block_size, sha256)

    def _later(self) -> float:
        """Seconds, each time some more, though the iteration's duration is not known yet."""
        self.spent += self.random.expovariate(1 / 0.004)
        return self.now + self.spent

    def _some_budget(
        self, inference: IterationWork, target_ms: float, left: int, has_queue: bool
    ) -> Budget:
        """In place of the latency model's; beside requests it may be nothing."""
        assert has_queue == bool(self.ours.get_request_counts()[1])
        tokens = self.case.budgets[self.iterations % len(self.case.budgets)]
        if not inference.has_inference:
            tokens = max(tokens, 16.0)
        most = min(int(tokens), self.case.finetuning_tokens, left)
        budget = Budget(tokens, 1.0, 2.0, most, rows=2.0, window=0.5)
        if not (self.deadlines and inference.has_inference):
            return budget
        return replace(budget, firm=self.random.random() * tokens, deadline_ms=2.0 * tokens)

    @property
    def schedulers(self) -> list[Scheduler]:
        return [self.ours, *([self.stock] if self.stock else [])]

    def receive(self) -> None:
        """What arrives with this iteration."""
        i, feeder = self.iterations, self.ours.feeder
        for index, some in enumerate(self.case.requests):
            for scheduler in self.schedulers:
                if some.at == i:
                    scheduler.add_request(
                        make_request(f"r{index}", list(some.prompt), some.output, 0.0, self.hasher)
                    )
                if some.abort == i and f"r{index}" in scheduler.requests:
                    scheduler.finish_requests(f"r{index}", RequestStatus.FINISHED_ABORTED)
        for number, job in enumerate(self.case.jobs, 1):
            if job.at == i:
                feeder.submit(
                    make_job(
                        number,
                        job.lengths,
                        batch_size=job.batch_size,
                        n_epochs=job.n_epochs,
                        weight=job.weight,
                        unmasked_from=job.unmasked_from,
                    )
                )
            if job.cancel == i:
                feeder.cancel(f"job-{number}")
        if i in self.case.resets:
            self.ours.reset_prefix_cache()

    def step(self) -> None:
        self.receive()
        self.iterations += 1
        output = self.ours.schedule()
        plan: StepPlan = getattr(output, "finetuning", None) or StepPlan()
        rows = {window.row_id for window in plan.forward}
        self._check_budgets(output, plan, rows)
        self.spent = 0.0
        answer, contents = self.worker.run(output)
        self.now += self.machine.seconds(contents, self.now)[0]
        expected = None
        if self.stock is not None:
            expected = self.stock.schedule()
            assert inference_part(output, rows) == inference_part(expected, set())
        self.in_flight.append((output, answer, expected, rows))
        if len(self.in_flight) > self.ahead:
            self.update()

    def update(self) -> None:
        """Both take in the results of the oldest iteration."""
        output, answer, expected, rows = self.in_flight.popleft()
        self.ours.update_from_output(output, answer)
        if self.stock is not None:
            self.stock.update_from_output(expected, without(answer, rows))

    def _check_budgets(self, output: Any, plan: StepPlan, rows: set[str]) -> None:
        case, scheduled = self.case, output.num_scheduled_tokens
        assert output.total_num_scheduled_tokens == sum(scheduled.values()) <= case.max_tokens
        assert sum(w.end - w.start for w in plan.forward) <= case.finetuning_tokens
        assert len(rows) == len(plan.forward) <= case.max_rows
        assert len(scheduled) - len(rows) <= case.max_num_seqs
        pool = self.ours.kv_cache_manager.block_pool
        used = sum(block.ref_cnt > 0 for block in pool.blocks[1:])
        assert pool.get_num_free_blocks() + used == case.blocks

    def run(self) -> None:
        """To the end of every request and job."""
        self._run()
        self._check_end()

    def run_whatever_raises(self) -> None:
        """The same where jobs may fail for other reasons than their own."""
        self._run()
        self._check_nothing_is_left()

    def _run(self) -> None:
        last = max(
            [x.at for x in (*self.case.requests, *self.case.jobs)]
            + [x.cancel or 0 for x in self.case.jobs]
        )
        while self.iterations <= last or self.ours.has_unfinished_requests():
            self.step_or_update()
            assert self.iterations < 20_000, "stock vLLM's own deadlock"
        # 16 tokens an iteration at least, each of them in one layer.
        tokens = sum(job.n_epochs * sum(job.lengths) for job in self.case.jobs)
        sequences = sum(job.n_epochs * len(job.lengths) for job in self.case.jobs)
        limit = self.iterations + 50 + 8 * (LAYERS + 2) * (tokens // 16 + sequences)
        while self.ours.has_requests() or self.in_flight:
            self.step_or_update()
            assert self.iterations < limit, "a job does not end"

    def step_or_update(self) -> None:
        """As vLLM's engine: it schedules where there is anything, and waits for results else."""
        if self.in_flight and not self.ours.has_requests():
            self.update()
        else:
            self.step()

    def _check_nothing_is_left(self) -> None:
        assert self.worker.is_empty
        assert not self.ours.planner.loops
        pages = self.ours.planner.packs.pages
        assert pages.num_free == pages.num_pages
        assert self.ours.kv_cache_manager.block_pool.get_num_free_blocks() == self.case.blocks

    def _check_end(self) -> None:
        self._check_nothing_is_left()
        journal = self.ours.feeder.journal
        for number, job in enumerate(self.case.jobs, 1):
            name = f"job-{number}"
            status = journal.status.get(name)
            if job.cancel is not None and status is not JobStatus.SUCCEEDED:
                # Cancelled before it came: nobody has ever heard of it.
                assert status is JobStatus.CANCELLED or job.cancel < job.at or too_long(job, self)
                continue
            if too_long(job, self):
                assert status is JobStatus.FAILED
                assert "longest example" in journal.errors[name]
                continue
            assert status is JobStatus.SUCCEEDED, journal.errors.get(name)
            every = {3 + index: job.n_epochs for index in range(len(job.lengths))}
            assert self.worker.examples[name] == every
            steps = journal.steps[name]
            assert len(steps) == job.n_epochs * -(-len(job.lengths) // job.batch_size)
            # A nat for each token: of the mean over the batch, nothing is lost or counted twice.
            assert all(step["train_loss"] == pytest.approx(1.0) for step in steps)
            assert steps[-1]["step"] == len(steps)
            # The last epochs are saved, each before the step that follows it.
            each = len(steps) // job.n_epochs
            epochs = range(max(1, job.n_epochs - EPOCHS_SAVED + 1), job.n_epochs + 1)
            assert self.worker.checkpoints[name] == [each * epoch for epoch in epochs]


def too_long(job: SomeJob, pair: Pair) -> bool:
    return max(job.lengths) - 1 > pair.case.longest


def inference_part(output: Any, rows: set[str]) -> dict[str, Any]:
    """What of an iteration concerns requests, in its order."""
    cached = output.scheduled_cached_reqs
    return {
        "tokens": [(i, n) for i, n in output.num_scheduled_tokens.items() if i not in rows],
        "new": [
            (x.req_id, x.num_computed_tokens)
            for x in output.scheduled_new_reqs
            if x.req_id not in rows
        ],
        "cached": [
            x
            for x in zip(
                cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
            )
            if x[0] not in rows
        ],
        "resumed": cached.resumed_req_ids,
        "preempted": output.preempted_req_ids or set(),
        "finished": {i for i in output.finished_req_ids if not i.startswith("finetuning-")},
    }


def without(answer: ModelRunnerOutput, rows: set[str]) -> ModelRunnerOutput:
    """The answer to a stock scheduler that never heard of these rows."""
    kept = [
        (i, tokens)
        for i, tokens in zip(answer.req_ids, answer.sampled_token_ids, strict=True)
        if i not in rows
    ]
    return ModelRunnerOutput(
        req_ids=[i for i, _ in kept],
        req_id_to_index={i: index for index, (i, _) in enumerate(kept)},
        sampled_token_ids=[tokens for _, tokens in kept],
    )
