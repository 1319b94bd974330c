"""vLLM's scheduler, extended: what inference leaves of an iteration is filled with finetuning."""

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.log import get_logger
from flexllm_vllm.patches import engine_core
from flexllm_vllm.scheduler.budget import TokenBudget
from flexllm_vllm.scheduler.feeder import JobFeeder
from flexllm_vllm.scheduler.hidden_rows import FinetuningSchedulerOutput, HiddenRows
from flexllm_vllm.scheduler.iterations import Iteration, IterationLog, count_inference_tokens
from flexllm_vllm.scheduler.job_runner import JobRunner
from flexllm_vllm.scheduler.planner import ModelShape, Planner

logger = get_logger(__name__)

engine_core.apply()


class FinetuningScheduler(Scheduler):
    """Stock scheduling first, finetuning with what is left.

    Inference gets what it would get from the stock scheduler: finetuning work is added after it,
    and where vLLM lacks a KV block that finetuning holds, finetuning gives it up before vLLM
    preempts a request or refuses one. An exception in finetuning ends jobs, never an iteration.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = FinetuningConfig.from_vllm_config(self.vllm_config)
        if config is None:
            raise ValueError("FinetuningScheduler needs a finetuning configuration")
        self._rows = HiddenRows(self, config.max_rows)
        self._planner = Planner(_model_shape(self.vllm_config), self._rows)
        self._budget = TokenBudget(config.max_tokens, config.tpot_slo_ms)
        self._iterations = IterationLog()
        self._iteration_began = (time.time(), time.perf_counter())
        self._engine_runs: Callable[[], bool] = lambda: True
        self._wake_engine: Callable[[], None] = lambda: None
        model_config = self.vllm_config.model_config
        names = model_config.served_model_name or model_config.model
        self._feeder = JobFeeder(
            config.dir,
            config.max_jobs,
            [names] if isinstance(names, str) else names,
            lambda: self._wake_engine(),
        )
        self._jobs = JobRunner(self._planner, self._feeder, model_config.model)
        self._give_way_to_inference()

    def attach_engine(self, engine: Any) -> None:
        """Called by the engine core before its loop starts (``patches/engine_core.py``)."""
        from vllm.v1.engine import EngineCoreRequestType

        self._engine_runs = engine.is_running
        self._wake_engine = lambda: engine.input_queue.put_nowait(
            (EngineCoreRequestType.WAKEUP, None)
        )

    def _give_way_to_inference(self) -> None:
        """Wraps ``allocate_slots``: vLLM preempts, or refuses a request, when it returns None,
        and does so within ``schedule()``, before any code of ours would run."""
        allocate = self.kv_cache_manager.allocate_slots

        def allocate_slots(*args: Any, **kwargs: Any) -> Any:
            blocks = allocate(*args, **kwargs)
            while blocks is None and self._planner.give_up_youngest():
                blocks = allocate(*args, **kwargs)
            return blocks

        self.kv_cache_manager.allocate_slots = allocate_slots

    @property
    def _may_finetune(self) -> bool:
        """Pausing and shutting down wait until the engine has no work: finetuning is none then."""
        return self._engine_runs() and self.pause_state is PauseState.UNPAUSED

    # -- vLLM's interface --------------------------------------------------------------------

    def has_requests(self) -> bool:
        return super().has_requests() or (self._may_finetune and self._jobs.has_work)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._iteration_began = (time.time(), time.perf_counter())
        output = super().schedule(*args, **kwargs)
        if not (self._may_finetune and self._jobs.has_work):
            return output
        try:
            self._jobs.take_news()
            inference_tokens = output.total_num_scheduled_tokens
            left = self.max_num_scheduled_tokens - inference_tokens
            plan = self._planner.plan(min(left, self._budget.tokens(inference_tokens)))
            return self._rows.attach(output, plan) if plan else output
        except Exception as error:
            logger.exception("planning finetuning work failed")
            self._jobs.fail_all(error)
            return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        result = getattr(model_runner_output, "finetuning", None)
        plan = getattr(scheduler_output, "finetuning", None)
        try:
            if plan is not None:
                self._jobs.apply(plan, result)
        except Exception as error:
            logger.exception("applying finetuning results failed")
            self._jobs.fail_all(error)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._record(scheduler_output)
        return outputs

    def set_pause_state(self, pause_state: PauseState) -> None:
        super().set_pause_state(pause_state)
        if pause_state is not PauseState.UNPAUSED:
            self._planner.give_up_all()

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        # vLLM refuses while anyone holds blocks.
        self._planner.give_up_all()
        return super().reset_prefix_cache(*args, **kwargs)

    def shutdown(self) -> None:
        self._feeder.stop()
        super().shutdown()

    # -- records -----------------------------------------------------------------------------

    def finetuning_iterations(self, last: int) -> list[dict[str, Any]]:
        """The last iterations, oldest first (see :class:`Iteration`)."""
        return self._iterations.last(last)

    def _record(self, output: Any) -> None:
        started, began = self._iteration_began
        forward = backward = 0
        decode, prefill = count_inference_tokens(output)
        if isinstance(output, FinetuningSchedulerOutput) and output.finetuning is not None:
            plan = output.finetuning
            forward = sum(w.end - w.start for w in plan.forward)
            layers = self._planner.shape.num_layers
            backward = sum(w.end - w.start for w in plan.backward if w.layer < layers)
            prefill -= forward
        if not (decode or prefill or forward or backward):
            return
        duration_ms = 1e3 * (time.perf_counter() - began)
        self._iterations.add(Iteration(started, duration_ms, decode, prefill, forward, backward))
        tokens = forward + backward // self._planner.shape.num_layers
        self._budget.observe(decode + prefill, tokens, duration_ms)


def _model_shape(vllm_config: Any) -> ModelShape:
    """Layers, and what the loss head costs beside one of them, from the model's configuration."""
    config = vllm_config.model_config.hf_text_config
    head_size = vllm_config.model_config.get_head_size()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = config.hidden_size * head_size * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return ModelShape(config.num_hidden_layers, config.vocab_size * config.hidden_size / layer)
