"""Fills an iteration with finetuning work: backward windows, optimizer steps, forward windows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm.lora.request import LoRARequest

from flexllm_vllm.log import get_logger
from flexllm_vllm.plan import (
    AdapterLayout,
    BackwardWindow,
    OpenPack,
    PackedSequence,
    PackResult,
    StepPlan,
)
from flexllm_vllm.scheduler.batch import BatchKind
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.hidden_rows import HiddenRows
from flexllm_vllm.scheduler.open_packs import OpenPacks
from flexllm_vllm.scheduler.pack import Pack, PackPhase, Sequence, make_packs
from flexllm_vllm.scheduler.pages import PagePool
from flexllm_vllm.scheduler.training_loop import TrainingLoop

logger = get_logger(__name__)

T = TypeVar("T")

# Smaller windows than this leave the GEMMs bound by reading the weights: on 2 cores 16 tokens run
# at a third of the speed of 128 (29 against 80 GFLOP/s).
MIN_WINDOW = 16

# Rows of a pack of several sequences, at least: on CPU GEMMs hardly gain beyond (on 2 cores 311,
# 341 and 342 GFLOP/s with 256, 512 and 2048 rows), and a pack that must be given up has lost less.
PACK_ROWS = 512


@dataclass(frozen=True)
class ModelShape:
    """What the planner must know of the model.

    Attributes:
        num_layers: decoder layers.
        loss_head_layers: cost of a token's loss head, in decoder layers.
    """

    num_layers: int
    loss_head_layers: float


class Planner:
    """Plans the finetuning work of all running jobs.

    Packs run in the order of their batch, of each job one at a time backward. When its backward
    ends within an iteration the rest goes to the next forward.

    Args:
        shape: of the model.
        rows: KV blocks and batch rows.
        max_tokens: of an iteration; a pack of several sequences holds as many as two.

    Attributes:
        min_window: a smaller backward window is not cut, even where the budget ends before.
        max_window: a larger forward or backward window is not planned; None for no bound.
        packs: that hold something.
        failed: jobs whose planning raised, to be taken by :meth:`take_failed`.
    """

    def __init__(self, shape: ModelShape, rows: HiddenRows, max_tokens: int = 0) -> None:
        self._pack_rows = max(PACK_ROWS, 2 * max_tokens)
        self.min_window = MIN_WINDOW
        self.max_window: int | None = None
        self.shape = shape
        head = shape.loss_head_layers
        self._layer_costs = (*(1.0,) * shape.num_layers, head, head / 2)
        self._rows = rows
        self.packs = OpenPacks(rows)
        self.loops: dict[str, TrainingLoop] = {}
        self._ended: list[str] = []
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
        per_page = self._tokens_per_page(loop, kind)
        packs = make_packs(
            loop.job.id,
            items,
            max_rows=min(self._pack_rows, self.packs.pages.num_pages // 2 * per_page),
            max_blocks=max(1, self._rows.num_blocks // 2),
            block_size=self._rows.block_size,
        )
        head = self.shape.num_layers
        for pack in packs:
            if not kind.is_trained:
                pack.layers = (head + 1, head + 1)
            elif loop.objective.needs_reference:
                pack.layers = (head + 1, loop.layout.lowest_layer)
            else:
                pack.layers = (head, loop.layout.lowest_layer)
        return packs

    @staticmethod
    def _tokens_per_page(loop: TrainingLoop, kind: BatchKind) -> int:
        assert loop.layout is not None
        if kind.is_trained:
            return loop.layout.tokens_per_page
        return loop.layout.score_tokens_per_page

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
                (:meth:`Budget.mixed_tokens`), something is kept for it.
        """
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
        left = budget.total
        # Who has had least for its weight comes first, so that tokens are shared fairly.
        loops = sorted((x for x in self.loops.values() if x.ready), key=lambda x: x.service)
        # Before any optimizer step is planned: what is saved are the weights before it.
        for loop in loops:
            if (order := self._guard(loop, TrainingLoop.take_save, loop)) is not None:
                plan.save.append(order)
        kept = 0.0
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
        self._leave_out_failed(plan)

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
        """Plans backward windows for a cost of ``limit``; returns what they cost.

        As few layers of as many tokens as possible: a window reads the weights of its layer,
        whatever its size.
        """
        used = 0.0
        for loop in loops:
            used += self._guard(loop, self._backward_of, loop, limit - used, budget, plan) or 0.0
        return used

    def _backward_of(
        self, loop: TrainingLoop, limit: float, budget: Budget, plan: StepPlan
    ) -> float:
        used = 0.0
        head = self.shape.num_layers
        per_layer = budget.backward / head  # of a token in one layer
        first = not plan.backward
        for pack in loop.batch.packs if loop.batch else []:
            if pack.phase is PackPhase.DONE:
                continue
            done = 0.0  # token-layers
            while pack.phase is PackPhase.BACKWARD and used < limit:
                whole = budget.window + pack.num_rows * per_layer
                if count := self._whole_layers(pack, limit - used, whole):
                    first = False
                    lowest = pack.layer - count + 1
                    window = (pack.pack_id, pack.layer, 0, pack.num_rows, lowest)
                    plan.backward.append(BackwardWindow(*window))
                    used += count * whole
                    done += count * pack.num_rows
                    pack.layer = lowest
                    self._advance(pack, pack.row)
                    continue
                row, layers = pack.row, self._layer_costs[pack.layer]
                cost = per_layer * layers
                wanted = int((limit - used - budget.window) / cost)
                if wanted < row and wanted < self.min_window and not first:
                    break
                first = False
                size = self._window(row, wanted, self.min_window)
                window = (pack.pack_id, pack.layer, row - size, row, pack.layer)
                plan.backward.append(BackwardWindow(*window))
                used += budget.window + size * cost
                done += size * layers
                self._advance(pack, size)
            if done:
                loop.serve(done * 2 / (3 * head))
            if pack.phase is PackPhase.BACKWARD:
                break
        return used

    def _whole_layers(self, pack: Pack, limit: float, cost: float) -> int:
        """Decoder layers of a pack that fit whole into what is left, from its present one on; each
        would be a window of its own otherwise."""
        if pack.layer >= self.shape.num_layers or pack.row < pack.num_rows:
            return 0
        if self.max_window is not None and pack.num_rows > self.max_window:
            return 0
        left = pack.layer - pack.layers[1] + 1
        return left if left * cost <= limit else int(limit / cost)

    def layers(self, layer: int) -> float:
        """Cost of a layer's backward in decoder layers; ``num_layers`` is the loss head, and the
        score above it is half of that: the logits, and nothing through them."""
        return self._layer_costs[layer]

    def _window(self, remaining: int, wanted: int, least: int) -> int:
        """Size of a window that begins with ``remaining`` tokens to go."""
        if wanted < least:
            wanted = least
        size = wanted if wanted < remaining else remaining
        return size if self.max_window is None else min(size, self.max_window)

    def _advance(self, pack: Pack, num_rows: int) -> None:
        pack.row -= num_rows
        if pack.row:
            return
        pack.layer -= 1
        pack.row = pack.num_rows
        if pack.layer < pack.layers[1]:
            # The worker runs backward windows before the forward: blocks and pages are free for the
            # forward windows of this very iteration.
            self.packs.finish(pack)

    def _plan_forward(self, loops: list[TrainingLoop], num_tokens: int, plan: StepPlan) -> None:
        for loop in loops:
            num_tokens -= self._guard(loop, self._forward_of, loop, num_tokens, plan) or 0

    def _forward_of(self, loop: TrainingLoop, num_tokens: int, plan: StepPlan) -> int:
        """Plans the next forward windows of a job; returns their tokens."""
        used = 0
        batch = loop.open_batch()
        for pack in batch.packs if batch else []:
            if pack.phase is PackPhase.WAITING and (
                used >= num_tokens or not self._admit(loop, pack, plan)
            ):
                break
            if pack.phase is PackPhase.FORWARD:
                size = self._forward(pack, num_tokens - used, plan)
                used += size
                loop.serve(size / 3)
        return used

    def _admit(self, loop: TrainingLoop, pack: Pack, plan: StepPlan) -> bool:
        """Opens a pack if pages and KV blocks are there for all of it."""
        assert loop.batch is not None
        assert loop.layout is not None
        kind = loop.batch.kind
        num_pages = -(-pack.num_rows // self._tokens_per_page(loop, kind))
        lora = LoRARequest(
            f"finetuning-{loop.job.id}", loop.job.adapter_int_id, "in the worker's memory"
        )
        if not self.packs.admit(pack, num_pages, None if kind is BatchKind.REFERENCE else lora):
            return False
        plan.open.append(
            OpenPack(
                pack_id=pack.pack_id,
                job_id=pack.job_id,
                sequences=tuple(
                    PackedSequence(s.request.request_id, s.targets)
                    for s in pack.sequences
                    if s.request is not None
                ),
                pages=pack.pages,
                loss_denominator=loop.batch.denominator,
                score_only=not kind.is_trained,
                preference=loop.preference_of(pack),
            )
        )
        return True

    def _forward(self, pack: Pack, num_tokens: int, plan: StepPlan) -> int:
        """Plans the next forward windows of a pack; returns their tokens."""
        used = 0
        for sequence in pack.sequences:
            size = self._window(sequence.num_rows - sequence.done, num_tokens - used, 0)
            if size <= 0 or self._rows.num_rows >= self._rows.max_rows:
                continue
            if not self._rows.extend(sequence, size):
                # Inference took the blocks that were free at admission: wait, others may end.
                self.packs.yield_to(pack, {window.pack_id for window in plan.forward})
                break
            plan.forward.append(self._rows.window(pack, sequence, size))
            sequence.done += size
            used += size
        if all(s.done == s.num_rows for s in pack.sequences):
            pack.begin_backward()
        return used

    # -- results -----------------------------------------------------------------------------

    def job_of(self, pack_id: int) -> str | None:
        """The job that a pack belongs to; None if it was given up."""
        pack = self.packs.get(pack_id)
        return pack.job_id if pack is not None else None

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
