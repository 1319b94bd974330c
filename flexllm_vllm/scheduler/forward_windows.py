"""Opens packs, and cuts their forward into windows."""

from vllm.lora.request import LoRARequest

from flexllm_vllm.plan import OpenPack, PackedSequence, StepPlan
from flexllm_vllm.scheduler.backward_windows import WindowBounds
from flexllm_vllm.scheduler.batch import BatchKind
from flexllm_vllm.scheduler.hidden_rows import HiddenRows
from flexllm_vllm.scheduler.open_packs import OpenPacks
from flexllm_vllm.scheduler.pack import Pack, PackPhase
from flexllm_vllm.scheduler.training_loop import TrainingLoop


def tokens_per_page(loop: TrainingLoop, kind: BatchKind) -> int:
    """Tokens of a job's batch that a page of the activation cache holds."""
    assert loop.layout is not None
    if kind.is_trained:
        return loop.layout.tokens_per_page
    return loop.layout.score_tokens_per_page


class ForwardWindows:
    """Plans the forward: packs in the order of their batch.

    Args:
        rows: KV blocks and batch rows.
        packs: that hold something.
        bounds: of the windows.
    """

    def __init__(self, rows: HiddenRows, packs: OpenPacks, bounds: WindowBounds) -> None:
        self._rows = rows
        self._packs = packs
        self._bounds = bounds

    def fill(
        self, loop: TrainingLoop, num_tokens: int, plan: StepPlan, may_open: bool = True
    ) -> int:
        """Plans the next forward windows of a job.

        Args:
            loop: of the job.
            num_tokens: that they may hold.
            plan: takes them.
            may_open: whether packs may be opened for it, or only those that are open go on.

        Returns:
            Their tokens.
        """
        used = 0
        batch = loop.open_batch()
        for pack in batch.packs if batch else []:
            if pack.phase is PackPhase.WAITING and (
                used >= num_tokens or not may_open or not self._admit(loop, pack, plan)
            ):
                break
            if pack.phase is PackPhase.FORWARD:
                size = self._forward(pack, num_tokens - used, plan)
                used += size
                loop.serve(size / 3)
        return used

    def starves(self, loop: TrainingLoop) -> bool:
        """Whether a job has no pack open since the packs of others hold what its next one needs."""
        batch = loop.batch
        if batch is None or any(pack.is_open for pack in batch.packs):
            return False
        waiting = next((p for p in batch.packs if p.phase is PackPhase.WAITING), None)
        return waiting is not None and self._packs.stand_in_the_way_of(
            waiting, self._num_pages(loop, waiting)
        )

    @staticmethod
    def _num_pages(loop: TrainingLoop, pack: Pack) -> int:
        """Pages of the activation cache that a pack of a job's batch needs."""
        assert loop.batch is not None
        return -(-pack.num_rows // tokens_per_page(loop, loop.batch.kind))

    def _admit(self, loop: TrainingLoop, pack: Pack, plan: StepPlan) -> bool:
        """Opens a pack if pages and KV blocks are there for all of it."""
        assert loop.batch is not None
        assert loop.layout is not None
        kind = loop.batch.kind
        num_pages = self._num_pages(loop, pack)
        lora = LoRARequest(
            f"finetuning-{loop.job.id}", loop.job.adapter_int_id, "in the worker's memory"
        )
        if not self._packs.admit(pack, num_pages, None if kind is BatchKind.REFERENCE else lora):
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
            size = self._bounds.size(sequence.num_rows - sequence.done, num_tokens - used)
            if size <= 0 or self._rows.num_rows >= self._rows.max_rows:
                continue
            if not self._rows.extend(sequence, size):
                # Inference took the blocks that were free at admission: wait, others may end.
                self._packs.yield_to(pack, {window.pack_id for window in plan.forward})
                break
            plan.forward.append(self._rows.window(pack, sequence, size))
            sequence.done += size
            used += size
        if all(s.done == s.num_rows for s in pack.sequences):
            pack.begin_backward()
        return used
