"""Executes the finetuning work of an iteration in the worker process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexllm_vllm.log import get_logger
from flexllm_vllm.models.base import ModelBackward
from flexllm_vllm.plan import BackwardWindow, ForwardWindow, JobFailure, StepPlan, StepResult
from flexllm_vllm.worker.activation_cache import ActivationCache
from flexllm_vllm.worker.adapter import TrainableAdapter
from flexllm_vllm.worker.adapter_files import save_adapter
from flexllm_vllm.worker.lora_slots import TrainingSlots
from flexllm_vllm.worker.packs import PackState

logger = get_logger(__name__)


class Trainer:
    """Owns the adapters in training, the open packs and the activation cache.

    An exception in any job's work ends that job and nothing else: it becomes a failure in the
    :class:`StepResult`, and the rest of the job's work in this plan is skipped.
    """

    def __init__(self, model: ModelBackward, cache: ActivationCache, slots: TrainingSlots) -> None:
        self.model = model
        self._cache = cache
        self._lora_slots = slots
        self.adapters: dict[str, TrainableAdapter] = {}
        self.packs: dict[int, PackState] = {}
        self._result = StepResult()
        self._capture_rows: torch.Tensor | None = None
        self._capture_slots: torch.Tensor | None = None
        self._capturing: list[ForwardWindow] = []
        model.install_capture(self._capture)

    def take_result(self) -> StepResult:
        """What came of the plan since the last call."""
        result, self._result = self._result, StepResult()
        return result

    def run(self, plan: StepPlan) -> None:
        """Everything of the plan but its forward windows."""
        for job_id in plan.end:
            self._guard(job_id, self._end, job_id)
        for pack_id in plan.drop:
            self._drop(pack_id)
        for spec in plan.start:
            self._guard(spec.job_id, self._start, spec)
        for pack in plan.open:
            self.packs[pack.pack_id] = PackState.open(pack)
        for window in plan.backward:
            state = self.packs.get(window.pack_id)
            if state is not None:
                job_id = state.spec.job_id
                self._guard(job_id, self._backward, window)
        for step in plan.optimize:
            self._guard(step.job_id, self._optimize, step)
        for save in plan.save:
            self._guard(save.job_id, self._save, save)

    def _guard(self, job_id: str, work: Callable[[Any], None], part: Any) -> None:
        if job_id in self._result.failures:
            return
        try:
            work(part)
        except Exception as error:
            logger.exception("finetuning job %s failed", job_id)
            self._result.failures[job_id] = JobFailure(
                "training_error", f"{type(error).__name__}: {error}"
            )

    # -- the plan's parts --------------------------------------------------------------------

    def _start(self, spec: Any) -> None:
        adapter = TrainableAdapter(spec, self.model)
        self._lora_slots.add(adapter)
        self.adapters[spec.job_id] = adapter

    def _end(self, job_id: str) -> None:
        for pack_id in [i for i, p in self.packs.items() if p.spec.job_id == job_id]:
            del self.packs[pack_id]
        adapter = self.adapters.pop(job_id, None)
        if adapter is not None:
            self._lora_slots.remove(adapter.spec.lora_int_id)

    def _drop(self, pack_id: int) -> None:
        pack = self.packs.pop(pack_id, None)
        if pack is not None and pack.d_hidden is not None:
            self.adapters[pack.spec.job_id].discard_pack_gradients()

    def _optimize(self, step: Any) -> None:
        adapter = self.adapters[step.job_id]
        norm = adapter.step(step.learning_rate, step.max_grad_norm)
        self._lora_slots.write(adapter)
        self._result.grad_norms[step.job_id] = norm

    def _save(self, save: Any) -> None:
        save_adapter(self.adapters[save.job_id], Path(save.path), save.base_model)
        self._result.saved.append(save.job_id)

    def _backward(self, window: BackwardWindow) -> None:
        pack = self.packs[window.pack_id]
        rows = slice(window.start, window.end)
        if window.layer == self.model.num_layers:
            if pack.d_hidden is None:
                pack.begin_backward(self.model)
            self._loss_head(pack, rows)
            if window.start == 0:
                self._result.losses[window.pack_id] = pack.loss
            return
        assert pack.d_hidden is not None
        adapter = self.adapters[pack.spec.job_id]
        if window.end == pack.spec.num_rows:
            pack.begin_layer()
        pack.d_hidden[rows] = self.model.layer_backward(
            window.layer,
            pack.d_hidden[rows],
            self._cache.read(window.layer, pack.slots[rows]),
            pack.positions[rows],
            pack.segments(window.start, window.end),
            adapter,
        )
        if window.layer == 0 and window.start == 0:
            adapter.commit_pack_gradients()
            del self.packs[window.pack_id]

    def _loss_head(self, pack: PackState, rows: slice) -> None:
        assert pack.d_hidden is not None
        targets = pack.targets[rows]
        bearing = (targets >= 0).nonzero().squeeze(1)
        if bearing.numel() == 0:
            return
        loss, d_hidden = self.model.loss_head(
            self._cache.read_final(pack.slots[rows][bearing]),
            targets[bearing],
            1.0 / pack.spec.loss_denominator,
        )
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise FloatingPointError(f"the loss is {loss}")
        pack.d_hidden[rows].index_copy_(0, bearing, d_hidden)
        pack.loss += loss

    # -- capture, within the fused forward ---------------------------------------------------

    def begin_forward(
        self,
        windows: list[ForwardWindow],
        batch_offsets: dict[str, int],
        block_ids: Callable[[str], list[int]],
    ) -> None:
        """Says which rows of the batch that is about to run are finetuning tokens.

        Args:
            windows: of this iteration.
            batch_offsets: first row of each request in the batch, by request id.
            block_ids: the block table of a request.
        """
        self._capturing = [w for w in windows if w.pack_id in self.packs]
        if not self._capturing:
            return
        try:
            self._map_rows(batch_offsets, block_ids)
        except Exception as error:
            self._fail_capture(error)

    def _map_rows(
        self, batch_offsets: dict[str, int], block_ids: Callable[[str], list[int]]
    ) -> None:
        rows, slots = [], []
        for window in self._capturing:
            pack = self.packs[window.pack_id]
            first = batch_offsets[window.row_id]
            offset = pack.offset(window.row_id)
            rows.append(torch.arange(first, first + window.end - window.start))
            slots.append(pack.slots[offset + window.start : offset + window.end])
            pack.block_ids[window.row_id] = torch.tensor(
                block_ids(window.row_id), dtype=torch.int64
            )
        self._capture_rows = torch.cat(rows)
        self._capture_slots = torch.cat(slots)

    def end_forward(self) -> None:
        """The forward is over: the next one captures nothing unless it is told to."""
        self._capture_rows = self._capture_slots = None
        self._capturing = []

    def _capture(self, layer: int, name: str, x: torch.Tensor, addend: torch.Tensor | None) -> None:
        if self._capture_rows is None or self._capture_slots is None:
            return
        try:
            self._cache.write(layer, name, self._capture_slots, self._capture_rows, x, addend)
        except Exception as error:
            self._fail_capture(error)

    def _fail_capture(self, error: Exception) -> None:
        """Fails the jobs of this forward's windows; the inference rows in it go on."""
        logger.exception("capturing activations failed")
        failure = JobFailure("training_error", f"{type(error).__name__}: {error}")
        for window in self._capturing:
            if window.pack_id in self.packs:
                self._result.failures[self.packs[window.pack_id].spec.job_id] = failure
        self.end_forward()
