"""Executes the finetuning work of an iteration in the worker process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexllm_vllm.log import get_logger
from flexllm_vllm.models.base import ActivationPolicy, ModelBackward, TrainedLinears
from flexllm_vllm.plan import (
    AdapterLayout,
    BackwardWindow,
    ForwardWindow,
    JobFailure,
    StepPlan,
    StepResult,
)
from flexllm_vllm.worker.activation_cache import ActivationCache, TokenLayout
from flexllm_vllm.worker.adapter import TrainableAdapter
from flexllm_vllm.worker.adapter_files import save_adapter
from flexllm_vllm.worker.lora_slots import TrainingSlots
from flexllm_vllm.worker.packs import PackState

logger = get_logger(__name__)


class Trainer:
    """Owns the adapters in training, the open packs and the activation cache.

    An exception in any job's work ends that job and nothing else: it becomes a failure in the
    :class:`StepResult`, and the rest of the job's work in this plan is skipped.

    Args:
        model: the backward of the loaded model.
        policy: what is kept of a forward.
        cache: where it is kept.
        slots: vLLM's LoRA slots.
    """

    def __init__(
        self,
        model: ModelBackward,
        policy: ActivationPolicy,
        cache: ActivationCache,
        slots: TrainingSlots,
    ) -> None:
        self.model = model
        self._policy: ActivationPolicy = policy
        self._cache = cache
        self._layouts: dict[str, TokenLayout] = {}
        self._lora_slots = slots
        self.adapters: dict[str, TrainableAdapter] = {}
        self.packs: dict[int, PackState] = {}
        self._result = StepResult()
        self._captures: list[_Capture] = []
        self._remove_hooks: Callable[[], None] | None = None

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
            self.packs[pack.pack_id] = PackState.open(pack, self.model)
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
        layout = self._cache.layout(kept_per_token(self.model, self._policy, adapter.trained))
        self._lora_slots.add(adapter)
        self.adapters[spec.job_id] = adapter
        self._layouts[spec.job_id] = layout
        self._result.started[spec.job_id] = AdapterLayout(
            layout.tokens_per_page, self._cache.num_pages, adapter.trained.lowest_layer
        )
        if self._remove_hooks is None:
            self._remove_hooks = self.model.install_capture(self._capture)

    def _end(self, job_id: str) -> None:
        for pack_id in [i for i, p in self.packs.items() if p.spec.job_id == job_id]:
            del self.packs[pack_id]
        adapter = self.adapters.pop(job_id, None)
        if adapter is not None:
            del self._layouts[job_id]
            self._lora_slots.remove(adapter.spec.lora_int_id)
        if not self.adapters and self._remove_hooks is not None:
            # A server that trains nothing pays nothing.
            self._remove_hooks()
            self._remove_hooks = None
            self.model.release()

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
        job_id = pack.spec.job_id
        adapter, layout = self.adapters[job_id], self._layouts[job_id]
        if window.end == pack.spec.num_rows:
            pack.begin_layer()
        saved = {
            name: self._cache.read(layout, pack.pages, (layer, name), window.start, window.end)
            for layer, name in layout.widths
            if layer == window.layer
        }
        d_input = self.model.layer_backward(
            window.layer,
            pack.d_hidden[rows],
            saved,
            pack.rotary[rows],
            pack.segments(window.start, window.end),
            adapter,
        )
        if d_input is not None:
            pack.d_hidden[rows] = d_input
        if window.layer == adapter.trained.lowest_layer and window.start == 0:
            adapter.commit_pack_gradients()
            del self.packs[window.pack_id]

    def _loss_head(self, pack: PackState, rows: slice) -> None:
        assert pack.d_hidden is not None
        targets = pack.targets[rows]
        bearing = (targets >= 0).nonzero().squeeze(1)
        if bearing.numel() == 0:
            return
        hidden = self._cache.read(
            self._layouts[pack.spec.job_id],
            pack.pages,
            (self.model.num_layers, "hidden"),
            rows.start,
            rows.stop,
        )
        loss, d_hidden = self.model.loss_head(
            hidden[bearing],
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
        windows = [w for w in windows if w.pack_id in self.packs]
        try:
            for window in windows:
                pack = self.packs[window.pack_id]
                pack.block_ids[window.row_id] = torch.tensor(
                    block_ids(window.row_id), dtype=torch.int64
                )
                first = batch_offsets[window.row_id]
                self._captures.append(
                    _Capture(
                        job_id=pack.spec.job_id,
                        rows=slice(first, first + window.end - window.start),
                        pages=pack.pages,
                        start=pack.offset(window.row_id) + window.start,
                    )
                )
        except Exception as error:
            self._fail_capture({self.packs[w.pack_id].spec.job_id for w in windows}, error)

    def end_forward(self) -> None:
        """The forward is over: the next one captures nothing unless it is told to."""
        self._captures = []

    def _capture(self, layer: int, name: str, x: torch.Tensor, addend: torch.Tensor | None) -> None:
        key = (layer, name)
        for capture in self._captures:
            layout = self._layouts[capture.job_id]
            if key not in layout.widths:
                continue
            try:
                values = x[capture.rows]
                if addend is not None:
                    values = values + addend[capture.rows]
                self._cache.write(layout, capture.pages, key, capture.start, values)
            except Exception as error:
                self._fail_capture({c.job_id for c in self._captures}, error)

    def _fail_capture(self, job_ids: set[str], error: Exception) -> None:
        """Fails the jobs of this forward's windows; the inference rows in it go on."""
        logger.exception("capturing activations failed")
        failure = JobFailure("training_error", f"{type(error).__name__}: {error}")
        for job_id in job_ids:
            self._result.failures[job_id] = failure
        self.end_forward()


@dataclass(frozen=True)
class _Capture:
    """A forward window whose activations are kept: rows of the batch, and where they go."""

    job_id: str
    rows: slice
    pages: list[int]
    start: int


def kept_per_token(
    model: ModelBackward, policy: ActivationPolicy, trained: TrainedLinears
) -> dict[tuple[int, str], int]:
    """(layer, name) -> elements that a token keeps; the input of the final norm is always kept."""
    kept = {
        (layer, name): width
        for layer in range(model.num_layers)
        for name, width in model.saved(layer, policy, trained).items()
    }
    return {**kept, (model.num_layers, "hidden"): model.hidden_size}
