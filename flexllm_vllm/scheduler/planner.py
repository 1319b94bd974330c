"""Fills an iteration with finetuning work: backward windows, optimizer steps, forward windows."""

from collections.abc import Callable
from typing import Any, TypeVar

from flexllm_vllm.log import get_logger
from flexllm_vllm.plan import (
    AdapterLayout,
    BackwardWindow,
    PackResult,
    StepPlan,
)
from flexllm_vllm.scheduler.backward_windows import BackwardWindows, ModelShape, WindowBounds
from flexllm_vllm.scheduler.batch import BatchKind
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.forward_windows import ForwardWindows, tokens_per_page
from flexllm_vllm.scheduler.hidden_rows import HiddenRows
from flexllm_vllm.scheduler.open_packs import OpenPacks
from flexllm_vllm.scheduler.optional_windows import OptionalWindows
from flexllm_vllm.scheduler.pack import Pack, Sequence, make_packs
from flexllm_vllm.scheduler.pages import PagePool
from flexllm_vllm.scheduler.training_loop import TrainingLoop

logger = get_logger(__name__)

T = TypeVar("T")

# Rows of a pack of several sequences, at least: on CPU GEMMs hardly gain beyond (on 2 cores 311,
# 341 and 342 GFLOP/s with 256, 512 and 2048 rows), and a pack that must be given up has lost less.
PACK_ROWS = 512
# ... and beside requests, where the iteration's end cuts windows anyway: the first pack of a batch
# has a forward with no backward beside it, and the shorter that is, the better.
PACK_ROWS_BESIDE_REQUESTS = 256
# Beside requests a forward with so many times its fixed cost goes with the backward of packs
# before. To put it off saves nothing: it would be as small in an iteration of its own, whose rest,
# kept free lest the forward be late, only a backward can use.
FORWARD_WORTH = 1.25


class Planner:
    """Plans the finetuning work of all running jobs.

    Packs run in the order of their batch, of each job one at a time backward. When its backward
    ends within an iteration the rest goes to the next forward.

    Args:
        shape: of the model.
        rows: KV blocks and batch rows.
        max_tokens: of an iteration; a pack of several sequences holds as many as two.

    Attributes:
        bounds: of the windows.
        packs: that hold something.
        backward, forward, optional: plan their windows.
        failed: jobs whose planning raised, to be taken by :meth:`take_failed`.
    """

    def __init__(self, shape: ModelShape, rows: HiddenRows, max_tokens: int = 0) -> None:
        self._pack_rows = max(PACK_ROWS, 2 * max_tokens)
        self.shape = shape
        self._rows = rows
        self.packs = OpenPacks(rows)
        self.bounds = WindowBounds()
        self.backward = BackwardWindows(shape, self.packs, self.bounds)
        self.forward = ForwardWindows(rows, self.packs, self.bounds)
        self.optional = OptionalWindows(shape, self.backward, self.bounds)
        self.loops: dict[str, TrainingLoop] = {}
        self._ended: list[str] = []
        self._has_deadline = False
        self.failed: dict[str, Exception] = {}

    # -- jobs --------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.loops or self._ended)

    def make_packs(
        self, loop: TrainingLoop, items: list[list[Sequence]], kind: BatchKind
    ) -> list[Pack]:
        """Packs of at most half the caches, so that two can be open, of one job or of two."""
        assert loop.layout is not None
        per_page = tokens_per_page(loop, kind)
        rows = PACK_ROWS_BESIDE_REQUESTS if self._has_deadline else self._pack_rows
        packs = make_packs(
            loop.job.id,
            items,
            max_rows=min(rows, self.packs.pages.num_pages // 2 * per_page),
            max_blocks=max(1, self._rows.num_blocks // 2),
            block_size=self._rows.block_size,
        )
        if self._has_deadline:
            # While it runs forward nothing waits for its backward, and what is kept free lest the
            # forward be late goes unused: the fewer rows it has the better.
            packs.insert(0, packs.pop(packs.index(min(packs, key=lambda pack: pack.num_rows))))
        head = self.shape.num_layers
        for pack in packs:
            if not kind.is_trained:
                pack.layers = (head + 1, head + 1)
            elif loop.objective.needs_reference:
                pack.layers = (head + 1, loop.layout.lowest_layer)
            else:
                pack.layers = (head, loop.layout.lowest_layer)
        return packs

    def started(self, job_id: str, layout: AdapterLayout) -> None:
        """The worker has created a job's adapter.

        Raises:
            ValueError: its data set has an example that can never run.
        """
        loop = self.loops.get(job_id)
        if loop is None:
            return
        if self.packs.pages.num_pages != layout.num_pages:
            self.packs.pages = PagePool(layout.num_pages)
        kept = layout.num_pages * layout.tokens_per_page
        in_kv_cache = self._rows.num_blocks * self._rows.block_size
        limit = min(kept, in_kv_cache)
        if loop.longest - 1 > limit:
            what = "example" if loop.objective.width == 1 else "pair of examples"
            raise ValueError(
                f"the longest {what} has {loop.longest} tokens, and this server can train "
                f"sequences of at most {limit + 1} (activation cache {kept} tokens, KV cache "
                f"{in_kv_cache} tokens)"
            )
        loop.layout = layout

    def add(self, loop: TrainingLoop) -> None:
        # A new job is not owed what others got before it came.
        loop.service = min((other.service for other in self.loops.values()), default=0.0)
        self.loops[loop.job.id] = loop

    def remove(self, job_id: str) -> None:
        """Takes a job out, finished or not: its packs and its LoRA slot become free."""
        loop = self.loops.pop(job_id, None)
        if loop is None:
            return
        if loop.started:
            self._ended.append(job_id)
        for pack in self.packs.of_job(job_id):
            self.packs.give_up(pack)

    def take_failed(self) -> dict[str, Exception]:
        """Jobs that were taken out since their planning raised."""
        failed, self.failed = self.failed, {}
        return failed

    # -- planning ----------------------------------------------------------------------------

    def plan(self, budget: Budget) -> StepPlan:
        """Plans an iteration.

        Args:
            budget: what its finetuning work may cost. The backward comes first, the forward gets
                what it leaves; where it is better to have both in every iteration
                (:meth:`Budget.mixed_tokens`), something is kept for it. With a deadline the
                forward comes first, and the backward is what the worker finds time for.
        """
        self._has_deadline = budget.deadline_ms is not None
        plan = StepPlan(end=self._ended, drop=self.packs.take_dropped())
        self._ended = []
        try:
            self._fill(plan, budget)
        except Exception:
            self.take_back(plan)
            raise
        return plan

    def take_back(self, plan: StepPlan) -> None:
        """A plan does not reach the worker, which will yet have to hear of what has ended."""
        self._ended = plan.end + self._ended
        self.packs.give_back_dropped(plan.drop)

    def _fill(self, plan: StepPlan, budget: Budget) -> None:
        for loop in self.loops.values():
            if not loop.started:
                self._guard(loop, lambda x: plan.start.append(x.start()), loop)
        # Who has had least for its weight comes first, so that tokens are shared fairly.
        loops = sorted((x for x in self.loops.values() if x.ready), key=lambda x: x.service)
        # Before any optimizer step is planned: what is saved are the weights before it.
        for loop in loops:
            if (order := self._guard(loop, TrainingLoop.take_save, loop)) is not None:
                plan.save.append(order)
        if budget.deadline_ms is None:
            self._fill_to_the_end(loops, budget, plan)
        elif budget.total > 0:
            self._fill_to_the_deadline(loops, budget, plan)
        self._leave_out_failed(plan)

    def _fill_to_the_end(self, loops: list[TrainingLoop], budget: Budget, plan: StepPlan) -> None:
        """Plans what is run whatever the time."""
        left, kept = budget.total, 0.0
        if left > 0:
            left -= self._plan_steps(loops, left, budget, plan)
            # Before the forward, as the worker runs it: a pack that ends makes room for the next.
            kept = budget.forward_cost(int(min(budget.mixed_tokens(left), budget.max_tokens)))
            left -= self._plan_backward(loops, left - kept, budget, plan)
            left -= self._plan_steps(loops, left, budget, plan)
        # What any forward costs must be worth it, unless there is nothing else to do.
        worth_it = kept or left >= 2 * budget.rows or not (plan.backward or plan.optimize)
        if left > budget.rows and worth_it:
            tokens = max(1, int(budget.forward_tokens(left)))
            self._plan_forward(loops, min(tokens, budget.max_tokens), plan)
        if kept and not plan.forward:
            # Nothing was there to run forward.
            self._plan_backward(loops, left, budget, plan)

    def _fill_to_the_deadline(
        self, loops: list[TrainingLoop], budget: Budget, plan: StepPlan
    ) -> None:
        """Plans steps and forward windows, which must end in time, and offers the backward.

        The forward first, as much as is sure to end: its fixed cost is worth the most tokens, and
        the time that is kept free beside it goes to the backward of packs before.
        """
        firm = budget.firm - self._plan_steps(loops, budget.firm, budget, plan)
        ready = [self._guard(loop, self.optional.is_ready, loop) for loop in loops]
        # What any forward costs must be worth it, unless there is nothing else to do.
        worth_it = not any(ready) or firm >= FORWARD_WORTH * budget.rows
        if firm > budget.rows and worth_it:
            tokens = max(1, int(budget.forward_tokens(firm)))
            self._plan_forward(loops, min(tokens, budget.max_tokens), plan)
        # All that the iteration could hold: the worker may be faster than expected.
        left = budget.deadline_ms or 0.0
        for loop in loops:
            left -= self._guard(loop, self.optional.offer, loop, left, budget, plan) or 0.0

    def _guard(self, loop: TrainingLoop, work: Callable[..., T], *arguments: Any) -> T | None:
        """Runs the planning of one job. An exception in it ends that job and no other."""
        if loop.job.id in self.failed:
            return None
        try:
            return work(*arguments)
        except Exception as error:
            logger.exception("planning the work of finetuning job %s failed", loop.job.id)
            self.failed[loop.job.id] = error
            return None

    def _leave_out_failed(self, plan: StepPlan) -> None:
        """Takes out of a plan what was planned of jobs before their planning failed."""
        if not self.failed:
            return
        packs = {p.pack_id for job_id in self.failed for p in self.packs.of_job(job_id)}
        packs |= {o.pack_id for o in plan.open if o.job_id in self.failed}
        for job_id in self.failed:
            self.remove(job_id)
        plan.start = [x for x in plan.start if x.job_id not in self.failed]
        plan.open = [x for x in plan.open if x.job_id not in self.failed]
        plan.optimize = [x for x in plan.optimize if x.job_id not in self.failed]
        plan.save = [x for x in plan.save if x.job_id not in self.failed]
        plan.backward = [x for x in plan.backward if x.pack_id not in packs]
        plan.forward = [x for x in plan.forward if x.pack_id not in packs]
        plan.optional = [x for x in plan.optional if x.window.pack_id not in packs]

    def _plan_steps(
        self, loops: list[TrainingLoop], limit: float, budget: Budget, plan: StepPlan
    ) -> float:
        """Plans the optimizer steps that are due, where they fit; returns what they cost.

        One that does not fit comes first in the next iteration, whatever it costs.
        """
        used = 0.0
        for loop in loops:
            if self._guard(loop, lambda x: x.step_is_due, loop):
                first = not plan.optimize and not plan.backward
                if first or used + budget.step <= limit:
                    order = self._guard(loop, TrainingLoop.close_batch, loop)
                    if order is not None:
                        plan.optimize.append(order)
                        used += budget.step
        return used

    def _plan_backward(
        self, loops: list[TrainingLoop], limit: float, budget: Budget, plan: StepPlan
    ) -> float:
        """Plans backward windows for a cost of ``limit``; returns what they cost."""
        used = 0.0
        for loop in loops:
            used += self._guard(loop, self.backward.fill, loop, limit - used, budget, plan) or 0.0
        return used

    def _plan_forward(self, loops: list[TrainingLoop], num_tokens: int, plan: StepPlan) -> None:
        may_open = True
        for loop in loops:
            used = self._guard(loop, self.forward.fill, loop, num_tokens, plan, may_open)
            num_tokens -= used or 0
            # Those after it have had more. Were they to take every page and block that becomes
            # free, a job with long examples would never get together what it needs.
            may_open = may_open and not self.forward.starves(loop)

    # -- results -----------------------------------------------------------------------------

    def job_of(self, pack_id: int) -> str | None:
        """The job that a pack belongs to; None if it was given up."""
        pack = self.packs.get(pack_id)
        return pack.job_id if pack is not None else None

    def ran(self, window: BackwardWindow) -> None:
        """The worker has run an optional window, or its last rows."""
        pack = self.packs.get(window.pack_id)
        if pack is not None and (loop := self.loops.get(pack.job_id)) is not None:
            self.optional.ran(loop, pack, window)

    def report(self, pack_id: int, result: PackResult) -> None:
        """The worker has the loss, or the score, of a pack."""
        pack = self.packs.get(pack_id)
        if pack is None:
            return
        pack.result = result
        self.packs.forget(pack)
        if (loop := self.loops.get(pack.job_id)) is not None:
            loop.pack_reported()

    def hold(self, job_id: str) -> None:
        """Plans nothing more of a job; its packs give up what they hold."""
        for pack in self.packs.of_job(job_id):
            self.packs.give_up(pack)
        self.loops[job_id].hold()
