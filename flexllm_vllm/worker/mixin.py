"""A worker of vLLM's, extended: it runs the finetuning part of each iteration's plan."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.config import VllmConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.frame_stack import with_room
from flexllm_vllm.log import get_logger
from flexllm_vllm.models import build_backward
from flexllm_vllm.models.base import ActivationPolicy, Capture, TrainedLinears
from flexllm_vllm.patches import eager_batches
from flexllm_vllm.plan import SaveAdapter, StepPlan, StepResult
from flexllm_vllm.worker import adapter_files
from flexllm_vllm.worker.activation_cache import PAGE_TOKENS, ActivationCache
from flexllm_vllm.worker.activation_codec import ActivationCodec, ActivationDtype, build_codec
from flexllm_vllm.worker.lora_slots import TrainingSlots
from flexllm_vllm.worker.memory import training_bytes
from flexllm_vllm.worker.model_runners import follow_batch_order, with_result
from flexllm_vllm.worker.side_stream import SideStream
from flexllm_vllm.worker.trainer import Trainer, kept_per_token

if TYPE_CHECKING:  # the mix-in extends its methods
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object

logger = get_logger(__name__)

# An iteration that only waits for the disk: short, since a request may arrive.
WAIT_FOR_DISK_S = 0.01


def with_hidden_rows(vllm_config: VllmConfig, config: FinetuningConfig) -> VllmConfig:
    """The worker's configuration: the user's, plus rows and LoRA slots for finetuning.

    The scheduler keeps the user's numbers and may fill them all; finetuning rows come on top.
    """
    lora = vllm_config.lora_config
    if lora is None or lora.max_cpu_loras is None:
        raise ValueError("finetuning needs vLLM's LoRA support, which is off in this configuration")
    worker_config = copy.copy(vllm_config)
    worker_config.scheduler_config = copy.copy(vllm_config.scheduler_config)
    worker_config.scheduler_config.max_num_seqs += config.max_rows
    worker_config.lora_config = copy.copy(lora)
    worker_config.lora_config.max_loras = lora.max_loras + config.training_slots
    worker_config.lora_config.max_cpu_loras = lora.max_cpu_loras + config.training_slots
    return worker_config


class FinetuningWorkerMixin(_Base):
    """Runs a :class:`StepPlan` inside each iteration that carries one.

    What differs from device to device is below, under its own heading.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        config = FinetuningConfig.from_vllm_config(vllm_config)
        if config is None:
            raise ValueError("FinetuningWorker needs a finetuning configuration")
        self._finetuning = config
        self._trainer: Trainer | None = None
        self._plan: StepPlan | None = None
        self._optional: StepPlan | None = None  # of the iteration whose tokens are to be sampled
        self._side: SideStream | None = None
        self._patch_vllm(config)
        super().__init__(with_hidden_rows(vllm_config, config), *args, **kwargs)

    # -- of a device -------------------------------------------------------------------------

    def _patch_vllm(self, config: FinetuningConfig) -> None:
        """Changes vLLM before it loads the model."""

    def _check_kv_layout(self) -> None:
        """Makes sure that the backward reads K and V as vLLM's attention has written them.

        Raises:
            ValueError: it would not.
        """
        raise NotImplementedError

    def _build_side_stream(self) -> SideStream | None:
        """A stream for the finetuning work beside the forward's; None where it runs before."""
        return None

    def _prepare_eager(
        self, model: torch.nn.Module, capture: Capture
    ) -> Callable[[bool], object] | None:
        """Prepares the model, which is compiled by now, for batches that need another graph.

        Args:
            model: vLLM's model.
            capture: what a graph of theirs hands the activations to.

        Returns:
            What selects the compiled graph of these batches (True) or the usual one; None where
            they run the model's layers eagerly.
        """
        return None

    def _needs_eager(self) -> bool:
        """Whether the batch that is about to run must run the model's layers themselves, outside
        of compiled and CUDA graphs, which capture nothing of it."""
        return self._plan is not None and bool(self._plan.forward)

    # -- start -------------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # Refuses an unsupported model now, before the KV cache takes the memory.
        self._backward = build_backward(
            self._model,
            self.model_config.architectures,
            self._finetuning.max_jobs,
            self._finetuning.attention_backend,
        )

    @property
    def _model(self) -> torch.nn.Module:
        """vLLM's model, below what captures CUDA graphs."""
        model: torch.nn.Module = self.model_runner.get_model()
        return model

    def determine_available_memory(self) -> int:
        """Leaves room for what training keeps, where vLLM sizes the KV cache by itself."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        num_pages, page_bytes, _ = self._cache_shape()
        training = training_bytes(self._backward, self._finetuning, num_pages * PAGE_TOKENS)
        return available - num_pages * page_bytes - training

    def _cache_shape(self) -> tuple[int, int, ActivationCodec]:
        """Pages of the activation cache, bytes of each, and how values are stored in them.

        A page is sized for adapters on all linear layers; others get more tokens into it.
        """
        config, model = self._finetuning, self._backward
        codec = build_codec(model.dtype, cast("ActivationDtype", config.activation_dtype))
        kept = kept_per_token(model, self._policy, TrainedLinears.all(model.num_layers))
        page_bytes = PAGE_TOKENS * sum(codec.row_bytes(width) for width in kept.values())
        if config.activation_cache_bytes is None:
            num_pages = -(-config.activation_cache_tokens // PAGE_TOKENS)
        else:
            num_pages = config.activation_cache_bytes // page_bytes
            if num_pages == 0:
                raise ValueError(
                    f"--finetuning-activation-cache-bytes is {config.activation_cache_bytes}; "
                    f"{PAGE_TOKENS} tokens of this model take {page_bytes}"
                )
        return num_pages, page_bytes, codec

    @property
    def _policy(self) -> ActivationPolicy:
        return cast("ActivationPolicy", self._finetuning.activation_policy)

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        self._start_trainer()
        return result

    @torch.inference_mode()
    def _start_trainer(self) -> None:
        runner, model = self.model_runner, self._backward
        self._check_kv_layout()
        adapter_files.prepare()
        cache = ActivationCache(*self._cache_shape(), self.device)
        self._announce(cache)
        self._side = self._build_side_stream()
        slots = TrainingSlots(self._lora_manager, self.lora_dtype, self.device)
        self._trainer = Trainer(model, self._policy, cache, slots)
        self._batch_order = follow_batch_order(runner)
        self._model.register_forward_pre_hook(self._before_forward)
        select_graph = self._prepare_eager(self._model, self._trainer.capture)
        eager_batches.apply(runner, self._model, self._needs_eager, select_graph)

    @property
    def _lora_manager(self) -> Any:
        """``vllm.lora.model_manager.LRUCacheLoRAModelManager``."""
        return self.model_runner.lora_manager._adapter_manager

    def _announce(self, cache: ActivationCache) -> None:
        """Says what the cache means to a user: how many long sequences it holds."""
        tokens = cache.num_pages * PAGE_TOKENS
        length = min(tokens, 4096, self.model_config.max_model_len)
        logger.info(
            "Finetuning activation cache: %.2f GiB, policy %s, %.0f KiB a token; it holds %d "
            "tokens, or %d sequences of %d",
            cache.num_bytes / 2**30,
            self._policy,
            cache.page_bytes / PAGE_TOKENS / 2**10,
            tokens,
            tokens // length,
            length,
        )

    @property
    def lora_dtype(self) -> torch.dtype:
        """dtype of vLLM's LoRA slots."""
        return self.vllm_config.lora_config.lora_dtype

    # -- iterations --------------------------------------------------------------------------

    def _before_forward(self, *_: Any) -> None:
        """Maps finetuning rows to the batch, whose order is final now."""
        if self._trainer is None or self._plan is None or not self._plan.forward:
            return
        offsets, first = {}, 0
        for req_id in self._batch_order():
            offsets[req_id] = first
            first += self._num_scheduled_tokens[req_id]
        with self._side.allocating() if self._side else nullcontext():
            self._trainer.begin_forward(self._plan.forward, offsets)

    @with_room
    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        plan = getattr(scheduler_output, "finetuning", None)
        self._optional = None
        if self._side is not None:
            self._side.wait_for_last()
        if self._trainer is None or (plan is None and not self._trainer.saver.is_busy):
            return super().execute_model(scheduler_output)
        plan = plan or StepPlan()
        if not scheduler_output.total_num_scheduled_tokens and not plan:
            # Nothing else is to be done than to wait for the disk.
            self._trainer.saver.wait(WAIT_FOR_DISK_S)
        self._plan = plan
        self._num_scheduled_tokens = scheduler_output.num_scheduled_tokens
        with self._work(before_forward=bool(plan.forward)):
            self._trainer.run(plan)
        try:
            output = super().execute_model(scheduler_output)
        finally:
            self._trainer.end_forward()
            self._plan = None
        self._optional = plan if plan.optional else None
        if isinstance(output, ModelRunnerOutput | AsyncModelRunnerOutput):
            return self._with_result(output)
        return output

    def _work(self, before_forward: bool) -> AbstractContextManager[None]:
        """Within it the finetuning work of an iteration is given to the device."""
        return self._side.work(before_forward) if self._side else nullcontext()

    @torch.inference_mode()
    def finetuning_save(self, orders: list[SaveAdapter], timeout_s: float) -> StepResult:
        """Writes adapters now and waits for it, and for those that are being written: called by the
        engine when it ends (``collective_rpc``)."""
        if self._trainer is None:
            return StepResult()
        with self._work(before_forward=True):
            self._trainer.run(StepPlan(save=orders))
        if not self._trainer.saver.wait_for_all(timeout_s):
            logger.warning("the disk is too slow: a checkpoint is not complete")
        return self._trainer.take_result().get()

    @with_room
    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._with_result(super().sample_tokens(grammar_output))

    def _with_result(self, output: Any) -> Any:
        """The output of an iteration, whose forward is over, with what came of its finetuning."""
        if self._trainer is None:
            return output
        if self._optional is not None:
            self._trainer.run_optional(self._optional)
            self._optional = None
        result = self._trainer.take_result()
        return with_result(output, result) if result else output
