"""Executes the finetuning work of an iteration in the worker process."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flexllm_vllm.log import get_logger
from flexllm_vllm.models.base import ActivationPolicy, ModelBackward, TrainedLinears
from flexllm_vllm.plan import (
    AdapterLayout,
    BackwardWindow,
    ForwardWindow,
    JobFailure,
    OpenPack,
    PackResult,
    SaveAdapter,
    StepPlan,
    StepResult,
)
from flexllm_vllm.worker.activation_cache import ActivationCache, KeptRows, TokenLayout
from flexllm_vllm.worker.adapter import TrainableAdapter
from flexllm_vllm.worker.deadline import OptionalRunner
from flexllm_vllm.worker.lora_slots import TrainingSlots
from flexllm_vllm.worker.packs import PackState
from flexllm_vllm.worker.preference import preference_loss
from flexllm_vllm.worker.readings import PendingResult, Readings, failure_of
from flexllm_vllm.worker.saver import AdapterSaver
from flexllm_vllm.worker.transfer import to_device

logger = get_logger(__name__)


class Trainer:
    """Owns the adapters in training, the open packs and the activation cache.

    An exception in any job's work ends that job and nothing else: it becomes a failure in the
    :class:`StepResult`, and the rest of the job's work in this plan is skipped. With tensor
    parallelism that holds for what every rank finds alike (numbers, a job's files); what may have
    happened to one rank alone (memory) ends the worker, as it does in inference: the ranks would
    wait for each other's collectives for ever. Numbers that are found not to be finite when they
    are read fail the job as well; what the plans in flight still hold of it changes no weights.

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
        self._score_layout = cache.layout({(model.num_layers, "hidden"): model.hidden_size})
        self._lora_slots = slots
        self.saver = AdapterSaver()
        self.adapters: dict[str, TrainableAdapter] = {}
        self.packs: dict[int, PackState] = {}
        self._result = StepResult()
        self._readings = Readings()
        self._optional = OptionalRunner()
        # What was planned of a job before its failure was known is still to come.
        self._failed: set[str] = set()
        self._captures: list[_Capture] = []
        self._remove_hooks: Callable[[], None] | None = None

    def take_result(self) -> PendingResult:
        """What came of the plans since the last call, or will when the device is through."""
        for saved in self.saver.take_results():
            if saved.error is None:
                self._result.saved.append(saved.order.path)
            else:
                logger.error("cannot save %s", saved.order.path, exc_info=saved.error)
                reason = f"its adapter cannot be saved: {saved.error}"
                self._result.failures[saved.order.job_id] = JobFailure("checkpoint_failed", reason)
        result, self._result = self._result, StepResult()
        return self._readings.collect(result)

    def run(self, plan: StepPlan) -> None:
        """Everything of the plan but its forward and its optional windows."""
        for job_id in plan.end:
            self._failed.discard(job_id)
            self._guard(job_id, self._end, job_id)
        for pack_id in plan.drop:
            pack_state = self.packs.get(pack_id)
            if pack_state is not None:
                self._guard(pack_state.spec.job_id, self._drop, pack_id)
        for spec in plan.start:
            self._guard(spec.job_id, self._start, spec)
        for pack in plan.open:
            self._guard(pack.job_id, self._open, pack)
        for window in plan.backward:
            state = self.packs.get(window.pack_id)
            if state is not None:
                job_id = state.spec.job_id
                self._guard(job_id, self._run_backward, window)
        for save in plan.save:
            self._guard(save.job_id, self._save, save)
        for step in plan.optimize:
            self._guard(step.job_id, self._optimize, step)

    def run_optional(self, plan: StepPlan) -> None:
        """What of the plan's optional windows there is time for; the forward is over."""
        done, duration_ms = self._optional.run(plan.optional, plan.deadline, self._run_if_possible)
        self._result.optional, self._result.optional_ms = done, duration_ms

    def _run_if_possible(self, window: BackwardWindow) -> bool:
        """Runs a window; False if its job has failed."""
        state = self.packs.get(window.pack_id)
        if state is None:
            return False
        self._guard(state.spec.job_id, self._backward, window)
        return state.spec.job_id not in self._failed

    def _guard(self, job_id: str, work: Callable[[Any], None], part: Any) -> None:
        if job_id in self._failed:
            return
        try:
            work(part)
        except Exception as error:
            self._raise_unless_shared(error)
            logger.exception("finetuning job %s failed", job_id)
            self._fail(job_id, failure_of(error))

    def _fail(self, job_id: str, failure: JobFailure) -> None:
        self._result.failures[job_id] = failure
        self._failed.add(job_id)

    def _raise_unless_shared(self, error: Exception) -> None:
        if self.model.parallel.size > 1 and not isinstance(error, (ArithmeticError, ValueError)):
            raise error

    # -- the plan's parts --------------------------------------------------------------------

    def _start(self, spec: Any) -> None:
        adapter = TrainableAdapter(spec, self.model)
        layout = self._cache.layout(kept_per_token(self.model, self._policy, adapter.trained))
        self._lora_slots.add(adapter)
        self.adapters[spec.job_id] = adapter
        self._layouts[spec.job_id] = layout
        self._result.started[spec.job_id] = AdapterLayout(
            layout.tokens_per_page,
            self._cache.num_pages,
            adapter.trained.lowest_layer,
            self._score_layout.tokens_per_page,
        )
        if self._remove_hooks is None:
            self._remove_hooks = self.model.install_capture(self.capture)

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

    def _open(self, spec: OpenPack) -> None:
        layout = self._score_layout if spec.score_only else self._layouts[spec.job_id]
        kept = self._cache.rows(layout, spec.pages)
        self.packs[spec.pack_id] = PackState.open(spec, self.model, kept)

    def _drop(self, pack_id: int) -> None:
        pack = self.packs.pop(pack_id)
        if pack.d_hidden is not None:
            self.adapters[pack.spec.job_id].discard_pack_gradients()

    def _optimize(self, step: Any) -> None:
        adapter = self.adapters[step.job_id]
        self.saver.wait_until_copied(adapter)
        norm = adapter.step(step.learning_rate, step.max_grad_norm)
        self._lora_slots.write(adapter)

        def take(result: StepResult, numbers: list[float]) -> None:
            (found,) = numbers
            if not math.isfinite(found):
                raise FloatingPointError(
                    f"the gradient norm is {found}; the weights were not changed"
                )
            result.grad_norms[step.job_id] = found

        self._readings.add(step.job_id, norm.double().view(1), take)

    def _save(self, save: SaveAdapter) -> None:
        adapter, parallel = self.adapters[save.job_id], self.model.parallel
        if parallel.size == 1 and self.model.device.type == "cpu":
            self.saver.save(save, adapter)
            return
        # By this thread, in the order of the ranks' collectives and of what the device does.
        snapshot = adapter.snapshot()
        if parallel.rank == 0:
            self.saver.save(save, adapter, snapshot)

    def _run_backward(self, window: BackwardWindow) -> None:
        for part in window.each_layer():
            self._backward(part)

    def _backward(self, window: BackwardWindow) -> None:
        """A window of one layer."""
        pack = self.packs[window.pack_id]
        rows = slice(window.start, window.end)
        if window.layer >= self.model.num_layers:
            if window.layer > self.model.num_layers:
                self._score(pack, rows)
            else:
                self._loss_head(pack, rows)
            if window.start == 0:
                self._report(pack, window)
            return
        assert pack.d_hidden is not None
        adapter = self.adapters[pack.spec.job_id]
        if window.end == pack.spec.num_rows:
            pack.begin_layer()
        saved = {
            name: self._cache.read(pack.kept, (layer, name), window.start, window.end)
            for layer, name in pack.kept.layout.widths
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

    def _bearing(self, pack: PackState, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the window's rows those that carry loss, and the input of the final norm there."""
        bearing = pack.bearing_in(rows)
        if bearing.numel() == 0:
            return bearing, bearing
        key = (self.model.num_layers, "hidden")
        return bearing, self._cache.read(pack.kept, key, rows.start, rows.stop)[bearing]

    def _score(self, pack: PackState, rows: slice) -> None:
        """Log-probabilities of the targets, without a gradient."""
        bearing, hidden = self._bearing(pack, rows)
        if bearing.numel() == 0:
            return
        found, _ = self.model.loss_head(hidden, pack.targets[rows][bearing], 0.0)
        pack.logps.index_add_(0, pack.sequence_of[rows][bearing], -found.losses)
        pack.num_correct += found.correct.sum()

    def _loss_head(self, pack: PackState, rows: slice) -> None:
        if pack.d_hidden is None:
            pack.begin_backward(self.model)
        assert pack.d_hidden is not None
        bearing, hidden = self._bearing(pack, rows)
        if bearing.numel() == 0:
            return
        preference = pack.spec.preference
        scale = 1.0 if preference else 1.0 / pack.spec.loss_denominator
        found, d_hidden = self.model.loss_head(hidden, pack.targets[rows][bearing], scale)
        assert d_hidden is not None
        if preference:
            assert pack.reference is not None
            _, factors = preference_loss(pack.logps, pack.reference, preference)
            d_hidden *= factors[pack.sequence_of[rows][bearing], None].to(d_hidden.dtype)
        else:
            pack.loss += found.losses.sum()
            pack.num_correct += found.correct.sum()
        pack.d_hidden[rows].index_copy_(0, bearing, d_hidden)

    def _report(self, pack: PackState, window: BackwardWindow) -> None:
        """Answers for a pack whose loss head, or score, is finished."""
        spec = pack.spec
        scored = window.layer > self.model.num_layers
        if scored and not spec.score_only:
            return
        if spec.score_only:
            del self.packs[spec.pack_id]
            values = torch.cat([pack.num_correct, pack.logps])
        elif spec.preference:
            assert pack.reference is not None
            losses, _ = preference_loss(pack.logps, pack.reference, spec.preference)
            rewards = spec.preference.beta * (pack.logps - pack.reference)
            values = torch.cat([losses.sum().view(1), rewards])
        else:
            values = torch.cat([pack.loss, pack.num_correct])
        self._readings.add(spec.job_id, values, partial(_take_pack, spec))

    # -- capture, within the fused forward ---------------------------------------------------

    def begin_forward(
        self,
        windows: list[ForwardWindow],
        batch_offsets: dict[str, int],
    ) -> None:
        """Says which rows of the batch that is about to run are finetuning tokens.

        Args:
            windows: of this iteration.
            batch_offsets: first row of each request in the batch, by request id.
        """
        for window in windows:
            pack = self.packs.get(window.pack_id)
            if pack is None:
                continue
            try:
                block_ids = torch.tensor(window.block_ids, dtype=torch.int64)
                pack.block_ids[window.row_id] = to_device(block_ids, self.model.device)
                first = batch_offsets[window.row_id]
                self._captures.append(
                    _Capture(
                        job_id=pack.spec.job_id,
                        kept=pack.kept,
                        rows=slice(first, first + window.end - window.start),
                        start=pack.offset(window.row_id) + window.start,
                    )
                )
            except Exception as error:
                self._fail_capture(pack.spec.job_id, error)

    def end_forward(self) -> None:
        """The forward is over: the next one captures nothing unless it is told to."""
        self._captures = []

    def capture(self, layer: int, name: str, x: torch.Tensor, addend: torch.Tensor | None) -> None:
        """Keeps the finetuning rows of ``x``, or of ``x + addend``, if their packs want them."""
        key = (layer, name)
        for capture in list(self._captures):
            if key not in capture.kept.layout.widths or capture.job_id in self._failed:
                continue
            try:
                more = None if addend is None else addend[capture.rows]
                self._cache.write(capture.kept, key, capture.start, x[capture.rows], more)
            except Exception as error:
                self._fail_capture(capture.job_id, error)

    def _fail_capture(self, job_id: str, error: Exception) -> None:
        """Fails a job that has windows in this forward; the other rows in it go on."""
        self._raise_unless_shared(error)
        logger.exception("capturing the activations of finetuning job %s failed", job_id)
        self._fail(job_id, failure_of(error))
        self._captures = [c for c in self._captures if c.job_id != job_id]


@dataclass(frozen=True)
class _Capture:
    """A forward window whose activations are kept: rows of the batch, and where they go."""

    job_id: str
    kept: KeptRows
    rows: slice
    start: int


def _take_pack(spec: OpenPack, result: StepResult, numbers: list[float]) -> None:
    """Puts what came of a pack into the iteration's result.

    Raises:
        FloatingPointError: its loss is not finite.
    """
    first, *rest = numbers
    if spec.score_only:
        found = PackResult(-sum(rest), int(first), tuple(rest))
    elif spec.preference:
        found = PackResult(first, rewards=tuple(rest))
    else:
        found = PackResult(first, int(rest[0]))
    if not math.isfinite(found.loss):
        raise FloatingPointError(f"the loss is {found.loss}")
    result.packs[spec.pack_id] = found


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
