"""vLLM's scheduler, extended: what inference leaves of an iteration is filled with finetuning."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.buckets import histogram_buckets

from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.jobs.adapter_folder import check_folder
from flexllm_vllm.log import get_logger
from flexllm_vllm.patches import engine_core
from flexllm_vllm.plan import StepPlan
from flexllm_vllm.scheduler.backward_windows import ModelShape
from flexllm_vllm.scheduler.budget import LatencyBudget
from flexllm_vllm.scheduler.calibration import Calibration
from flexllm_vllm.scheduler.feeder import JobFeeder, NoStore
from flexllm_vllm.scheduler.hidden_rows import HiddenRows
from flexllm_vllm.scheduler.iterations import inference_work
from flexllm_vllm.scheduler.job_runner import JobRunner
from flexllm_vllm.scheduler.latency_model import IterationWork
from flexllm_vllm.scheduler.planner import Planner
from flexllm_vllm.scheduler.recorder import InFlight, IterationRecorder
from flexllm_vllm.scheduler.stats import FinetuningStats

logger = get_logger(__name__)

engine_core.apply()

# Within the time that the engine has to end (SHUTDOWN_TIMEOUT in engine_args.py).
SAVE_TIMEOUT_S = 8.0

ONE_REQUEST = IterationWork(decode_rows=1.0)


if TYPE_CHECKING:  # the mix-in extends its methods
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object


class FinetuningMixin(_Base):
    """Over one of vLLM's schedulers: stock scheduling first, finetuning with what is left.

    Inference gets what it would get from the stock scheduler: finetuning work is added after it,
    and where vLLM lacks a KV block that finetuning holds, finetuning gives it up before vLLM
    preempts a request or refuses one. An exception in finetuning ends jobs, never an iteration.

    With asynchronous scheduling an iteration is planned before the results of the last are known:
    no plan depends on them, but for those of jobs that wait for a result (a new adapter, the
    scores of a reference). The worker runs iterations in their order, so that blocks and pages
    which a plan frees may be given to rows of the same plan, whatever is still in flight.
    """

    # Seconds; a simulation has its own.
    _clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = FinetuningConfig.from_vllm_config(self.vllm_config)
        if config is None:
            raise ValueError("FinetuningScheduler needs a finetuning configuration")
        self._rows = HiddenRows(self, config.max_rows)
        self._planner = Planner(_model_shape(self.vllm_config), self._rows, config.max_tokens)
        self._max_tokens = config.max_tokens
        self._budget = LatencyBudget(
            config.max_tokens,
            config.tpot_slo_ms,
            config.ttft_slo_ms,
            num_in_flight=2 if isinstance(self, AsyncScheduler) else 1,
            has_deadlines=self._can_end_backward(),
        )
        observability = self.vllm_config.observability_config
        self._stats = FinetuningStats(
            histogram_buckets(
                "inter_token_latency", overrides=observability.custom_histogram_buckets
            )
        )
        shape = self._planner.shape
        self._recorder = IterationRecorder(
            self._clock, self._budget, self._stats, shape.num_layers, self._planner.backward.layers
        )
        self._is_recording = True
        self._calibration: Calibration | None = None
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
        self._jobs = JobRunner(
            self._planner,
            self._feeder,
            model_config.model,
            self._stats,
            config.checkpoint_interval_s,
        )
        self._give_way_to_inference()

    def _can_end_backward(self) -> bool:
        """Whether the worker can end the backward of an iteration when it is time, and the next
        plan knows how far it came: one rank, on a processor that the host waits for anyway."""
        config = self.vllm_config
        return (
            config.device_config.device_type == "cpu"
            and config.parallel_config.world_size == 1
            and not isinstance(self, AsyncScheduler)
        )

    def attach_engine(self, engine: Any) -> None:
        """Called by the engine core before its loop starts (``patches/engine_core.py``)."""
        from vllm.v1.engine import EngineCoreRequestType

        self._engine_runs = engine.is_running
        self._wake_engine = lambda: engine.input_queue.put_nowait(
            (EngineCoreRequestType.WAKEUP, None)
        )
        self._calibrate(engine)

    def detach_engine(self, engine: Any) -> None:
        """Called by the engine core when its loop has ended, with the worker still alive: writes a
        checkpoint of every job, so that no step is lost."""
        try:
            orders = self._jobs.checkpoint_orders()
            for result in engine.model_executor.collective_rpc(
                "finetuning_save", args=(orders, SAVE_TIMEOUT_S)
            ):
                self._jobs.apply_saved(result.saved)
                for job_id, failure in result.failures.items():
                    logger.error("no checkpoint of %s: %s", job_id, failure.message)
        except Exception:
            logger.exception("cannot write the last checkpoints")

    def _calibrate(self, engine: Any) -> None:
        """Measures this machine, so that the first iterations with a job are within their target.

        Engines that step together (data parallel) do without: theirs learn from the traffic.
        """
        if self.vllm_config.parallel_config.data_parallel_size > 1:
            return
        began = time.monotonic()
        jobs = self._jobs
        self._jobs = JobRunner(self._planner, NoStore(), "", FinetuningStats([]))
        self._calibration = Calibration(engine, self, self._planner, self._max_tokens)
        self._recorder.calibrate = self._calibration.observe
        try:
            self._budget.calibrate(self._calibration.run())
            logger.info(
                "finetuning calibrated in %.1f s: an iteration with one request takes %.1f ms, "
                "at most %.0f ms with finetuning, and %.0f ms without requests",
                time.monotonic() - began,
                self._budget.model.predict_ms(ONE_REQUEST),
                self._budget.target_ms(ONE_REQUEST),
                self._budget.target_ms(IterationWork()),
            )
            logger.debug("milliseconds: %s", self._budget.model.coefficients)
        except Exception:
            logger.exception("finetuning is not calibrated, and will learn from the traffic")
        finally:
            self._jobs, self._calibration, self._recorder.calibrate = jobs, None, None
            self._planner.packs.num_dropped = 0

    def _give_way_to_inference(self) -> None:
        """Wraps ``allocate_slots``: vLLM preempts, or refuses a request, when it returns None,
        and does so within ``schedule()``, before any code of ours would run."""
        allocate = self.kv_cache_manager.allocate_slots

        def allocate_slots(*args: Any, **kwargs: Any) -> Any:
            blocks = allocate(*args, **kwargs)
            while blocks is None and self._give_up(self._planner.packs.give_up_youngest):
                blocks = allocate(*args, **kwargs)
            return blocks

        self.kv_cache_manager.allocate_slots = allocate_slots

    def _give_up(self, give_up: Callable[[], bool]) -> bool:
        """Has the planner free KV blocks. Returns whether there are more than before.

        It is called in the midst of vLLM's own work: an exception ends jobs, which frees them too.
        """
        try:
            return give_up()
        except Exception as error:
            logger.exception("giving up finetuning work failed")
            had_jobs = bool(self._planner.loops)
            self._jobs.fail_all(error)
            return had_jobs

    @property
    def _may_finetune(self) -> bool:
        """Pausing and shutting down wait until the engine has no work: finetuning is none then."""
        return self._engine_runs() and self.pause_state is PauseState.UNPAUSED

    # -- vLLM's interface --------------------------------------------------------------------

    def has_requests(self) -> bool:
        return super().has_requests() or (self._may_finetune and self._jobs.has_work)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        iteration = self._recorder.begin()
        output = super().schedule(*args, **kwargs)
        if self._may_finetune and self._jobs.has_work:
            output = self._add_finetuning(output, iteration)
        iteration.output = output
        return output

    def _add_finetuning(self, output: SchedulerOutput, iteration: InFlight) -> SchedulerOutput:
        """vLLM's output with the finetuning work that fits into its iteration."""
        plan: StepPlan | None = None
        try:
            self._jobs.take_news()
            left = self.max_num_scheduled_tokens - output.total_num_scheduled_tokens
            inference = iteration.inference = inference_work(output)
            target_ms = iteration.target_ms = self._budget.target_ms(inference)
            calibration = self._calibration
            if calibration is None:
                budget = self._budget.budget(inference, target_ms, left, bool(self.waiting))
            else:
                budget = replace(
                    calibration.budget, max_tokens=min(left, calibration.budget.max_tokens)
                )
            plan = self._planner.plan(budget)
            self._jobs.take_failed()
            if plan.optional and budget.deadline_ms is not None:
                iteration.deadline_ms = budget.deadline_ms
                plan.deadline = iteration.began + budget.deadline_ms / 1e3
            return self._rows.attach(output, plan) if plan else output
        except Exception as error:
            logger.exception("planning finetuning work failed")
            if plan is not None:
                self._planner.take_back(plan)
            self._jobs.fail_all(error)
            return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        result = getattr(model_runner_output, "finetuning", None)
        plan = getattr(scheduler_output, "finetuning", None)
        try:
            # What is saved in the background is reported when nothing may be planned.
            if plan is not None or result is not None:
                self._jobs.apply(plan or StepPlan(), result)
        except Exception as error:
            logger.exception("applying finetuning results failed")
            self._jobs.fail_all(error)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._is_recording:
            try:
                self._recorder.end(scheduler_output, result)
            except Exception:
                # Finetuning goes on with what the latency model has learnt so far.
                logger.exception("iterations are recorded no more")
                self._is_recording = False
        return outputs

    def set_pause_state(self, pause_state: PauseState) -> None:
        super().set_pause_state(pause_state)
        if pause_state is not PauseState.UNPAUSED:
            self._give_up(self._planner.packs.give_up_all)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        # vLLM refuses while anyone holds blocks.
        self._give_up(self._planner.packs.give_up_all)
        return super().reset_prefix_cache(*args, **kwargs)

    def shutdown(self) -> None:
        self._feeder.stop()
        super().shutdown()

    # -- records -----------------------------------------------------------------------------

    def finetuning_iterations(self, last: int) -> list[dict[str, Any]]:
        """The last iterations, oldest first (see :class:`Iteration`)."""
        return self._recorder.log.last(last)

    def finetuning_stats(self) -> dict[str, Any]:
        """Counters and gauges for ``/metrics`` (see :class:`FinetuningStats`)."""
        model, pages = self._budget.model, self._planner.packs.pages
        return self._stats.snapshot(
            running_jobs=self._planner.loops,
            dropped_packs=self._planner.packs.num_dropped,
            pages=pages.num_pages,
            free_pages=pages.num_free,
            mape=model.mape,
            margin=model.margin,
            overrun=self._budget.overrun,
            pace=model.pace,
            knee=model.knee,
            costs_ms=model.coefficients,
        )

    @staticmethod
    def check_adapter(lora: LoRARequest) -> None:
        """Whether an adapter of the store can still be loaded. Called from an input thread.

        Raises:
            FileNotFoundError: it was deleted.
        """
        check_folder(lora.lora_int_id, Path(lora.lora_path))

    def finetuning_adapters_in_use(self) -> list[int]:
        """vLLM's ids of the adapters that requests, waiting or running, have named."""
        loras = (request.lora_request for request in self.requests.values())
        return sorted({lora.lora_int_id for lora in loras if lora is not None})


def _model_shape(vllm_config: Any) -> ModelShape:
    """Layers, and what the loss head costs beside one of them, from the model's configuration."""
    config = vllm_config.model_config.hf_text_config
    head_size = vllm_config.model_config.get_head_size()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = config.hidden_size * head_size * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return ModelShape(config.num_hidden_layers, config.vocab_size * config.hidden_size / layer)


class FinetuningScheduler(FinetuningMixin, Scheduler):
    """An iteration is planned when the last has ended."""


class AsyncFinetuningScheduler(FinetuningMixin, AsyncScheduler):
    """An iteration is planned while the last one runs: vLLM's default on GPUs."""


def finetuning_scheduler(*args: Any, vllm_config: VllmConfig, **kwargs: Any) -> FinetuningMixin:
    """What vLLM finds as its ``scheduler_cls``: whether it schedules asynchronously is settled only
    when its configuration is complete."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler = AsyncFinetuningScheduler if is_async else FinetuningScheduler
    return scheduler(*args, vllm_config=vllm_config, **kwargs)
