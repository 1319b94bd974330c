"""Jobs in the engine: takes them from the store, applies what came of their work, ends them."""

from collections.abc import Callable
from typing import Any

from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.log import get_logger
from flexllm_vllm.plan import JobFailure, PackResult, SaveAdapter, StepPlan, StepResult
from flexllm_vllm.scheduler.feeder import ClaimedJob, JobFeeder, NoStore
from flexllm_vllm.scheduler.planner import Planner
from flexllm_vllm.scheduler.stats import FinetuningStats
from flexllm_vllm.scheduler.training_loop import TrainingLoop

logger = get_logger(__name__)


class JobRunner:
    """Moves jobs between the store and the planner. An exception in a job's part ends that job.

    Args:
        planner: plans the work of running jobs.
        feeder: the link to the store.
        base_model: path or hub name of the model, recorded in the adapters.
        stats: counts optimizer steps.
        checkpoint_interval_s: seconds from one checkpoint of a job to the next.
    """

    def __init__(
        self,
        planner: Planner,
        feeder: JobFeeder | NoStore,
        base_model: str,
        stats: FinetuningStats,
        checkpoint_interval_s: float = float("inf"),
    ) -> None:
        self._stats = stats
        self._base_model = base_model
        self._planner = planner
        self._feeder = feeder
        self._checkpoint_interval_s = checkpoint_interval_s

    @property
    def has_work(self) -> bool:
        return self._planner.has_work or self._feeder.has_news

    def take_news(self) -> None:
        """Starts claimed jobs, ends cancelled ones, holds those that are to be paused."""
        for claimed in self._feeder.take_jobs():
            self._guard(claimed.job.id, self._start, claimed)
        for job_id in self._feeder.take_cancellations():
            loop = self._planner.loops.get(job_id)
            if loop is not None:
                self._planner.remove(job_id)
                self._feeder.cancelled(loop.job)
        for job_id, failure in self._feeder.take_broken():
            if job_id in self._planner.loops:
                self._fail(job_id, failure)
        for job_id in self._feeder.take_pauses():
            loop = self._planner.loops.get(job_id)
            if loop is not None and not loop.finished:
                self._guard(job_id, self._planner.hold, job_id)
        for job_id, loop in list(self._planner.loops.items()):
            self._guard(job_id, self._end_if_over, loop)

    def take_failed(self) -> None:
        """Ends jobs whose planning raised."""
        for job_id, error in self._planner.take_failed().items():
            self._fail(job_id, _failure(error))

    def _guard(self, job_id: str, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            if not isinstance(error, ValueError):
                logger.exception("finetuning job %s: unexpected error", job_id)
            self._fail(job_id, _failure(error))

    def _start(self, claimed: ClaimedJob) -> None:
        loop = TrainingLoop(
            claimed.job,
            claimed.dataset,
            self._planner.make_packs,
            self._base_model,
            claimed.validation,
            claimed.resume,
            self._checkpoint_interval_s,
        )
        self._planner.add(loop)
        logger.info(
            "finetuning job %s: %d examples, steps %d to %d",
            claimed.job.id,
            len(claimed.dataset),
            loop.step + 1,
            loop.total_steps,
        )

    def apply(self, plan: StepPlan, result: StepResult | None) -> None:
        """Takes in what the worker answered to a plan."""
        result = result or StepResult()
        for job_id, failure in result.failures.items():
            # Of one that has failed meanwhile the worker may still report what was planned before.
            if job_id in self._planner.loops:
                self._fail(job_id, failure)
        for job_id, layout in result.started.items():
            self._guard(job_id, self._planner.started, job_id, layout)
        for window in result.optional:
            owner = self._planner.job_of(window.pack_id)
            if owner is not None:
                self._guard(owner, self._planner.ran, window)
        for pack_id, pack_result in result.packs.items():
            owner = self._planner.job_of(pack_id)
            if owner is not None:
                self._guard(owner, self._report, owner, pack_id, pack_result)
        for job_id, grad_norm in result.grad_norms.items():
            self._guard(job_id, self._step_done, job_id, grad_norm)
        self.apply_saved(result.saved)

    def _report(self, job_id: str, pack_id: int, result: PackResult) -> None:
        self._planner.report(pack_id, result)
        loop = self._planner.loops.get(job_id)
        if loop is not None and (metrics := loop.take_evaluation()) is not None:
            self._evaluated(loop, metrics)

    def _evaluated(self, loop: TrainingLoop, metrics: dict[str, Any]) -> None:
        job_id, step, stopped = loop.job.id, loop.step, loop.progress.stopped

        def write(store: JobStore) -> None:
            store.record_evaluation(job_id, step, metrics)
            if stopped:
                message = f"Training stops early at step {step}: no better validation loss"
                store.add_event(job_id, "info", message, key="early-stop")

        self._feeder.write(job_id, write)

    def _step_done(self, job_id: str, grad_norm: float) -> None:
        loop = self._planner.loops.get(job_id)
        if loop is None:
            return
        metrics = loop.step_done(grad_norm)
        step, total, tokens = loop.progress.step, loop.total_steps, loop.progress.trained_tokens
        self._stats.optimizer_step(
            job_id,
            step=step,
            loss=metrics["train_loss"],
            grad_norm=grad_norm,
            tokens=metrics["tokens"],
        )

        def write(store: JobStore) -> None:
            store.record_progress(job_id, step, total, tokens)
            store.record_step(job_id, step, metrics)

        self._feeder.write(job_id, write)

    def apply_saved(self, paths: list[str]) -> None:
        """Takes in what the worker has written."""
        for path in paths:
            for loop in list(self._planner.loops.values()):
                if loop.saving is not None and loop.saving.written_to == path:
                    self._guard(loop.job.id, self._saved, loop)

    def _saved(self, loop: TrainingLoop) -> None:
        save = loop.saved()
        if save.is_final:
            self._end(loop)
            return
        best = loop.progress.best_step if loop.job.training.load_best_model_at_end else 0
        self._feeder.checkpointed(loop.job, save, best)

    def _end_if_over(self, loop: TrainingLoop) -> None:
        if loop.has_ended:
            self._end(loop)

    def _end(self, loop: TrainingLoop) -> None:
        """The job is paused, or its adapter is complete (or is to be copied from a checkpoint)."""
        job, progress, result_step = loop.job, loop.progress, loop.result_step
        pausing = loop.pausing
        self._planner.remove(job.id)
        if pausing:
            self._feeder.paused(job, progress.step)
        else:
            self._feeder.completed(job, result_step)

    def checkpoint_orders(self) -> list[SaveAdapter]:
        """Checkpoints of all jobs, where one is needed for nothing to be lost: the engine ends."""
        orders = []
        for job_id, loop in list(self._planner.loops.items()):
            self._guard(job_id, lambda loop=loop: orders.append(loop.save_now()))
        return [order for order in orders if order is not None]

    def _fail(self, job_id: str, failure: JobFailure) -> None:
        logger.error("finetuning job %s failed: %s", job_id, failure.message)
        loop = self._planner.loops.get(job_id)
        message = failure.message
        if loop is not None and loop.progress.step:
            message += f" (at step {loop.progress.step + 1} of {loop.total_steps})"
        try:
            self._planner.remove(job_id)
        finally:
            self._feeder.failed(job_id, JobFailure(failure.code, message))

    def fail_all(self, error: Exception) -> None:
        """Ends every running job: the planner's state cannot be trusted after ``error``. It raises
        nothing itself."""
        for job_id in list(self._planner.loops):
            try:
                self._fail(job_id, _failure(error))
            except Exception:
                logger.exception("taking out finetuning job %s failed", job_id)
        try:
            self._planner.packs.reset()
        except Exception:
            logger.exception("freeing what finetuning holds failed")


def _failure(error: Exception) -> JobFailure:
    if isinstance(error, ValueError):
        return JobFailure("invalid_training_data", str(error))
    return JobFailure("server_error", f"{type(error).__name__}: {error}")
