"""Jobs in the engine: takes them from the store, applies what came of their work, ends them."""

from functools import partial

from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.log import get_logger
from flexllm_vllm.plan import JobFailure, StepPlan, StepResult
from flexllm_vllm.scheduler.feeder import ClaimedJob, JobFeeder, NoStore
from flexllm_vllm.scheduler.planner import Planner
from flexllm_vllm.scheduler.stats import FinetuningStats
from flexllm_vllm.scheduler.training_loop import TrainingLoop

logger = get_logger(__name__)


def _cancelled(job_id: str, store: JobStore) -> None:
    store.cancelled(job_id)


class JobRunner:
    """Moves jobs between the store and the planner.

    Args:
        planner: plans the work of running jobs.
        feeder: the link to the store.
        base_model: path or hub name of the model, recorded in the adapters.
        stats: counts optimizer steps.
    """

    def __init__(
        self,
        planner: Planner,
        feeder: JobFeeder | NoStore,
        base_model: str,
        stats: FinetuningStats,
    ) -> None:
        self._stats = stats
        self._base_model = base_model
        self._planner = planner
        self._feeder = feeder

    @property
    def has_work(self) -> bool:
        return self._planner.has_work or self._feeder.has_news

    def take_news(self) -> None:
        """Starts claimed jobs, ends cancelled ones."""
        for claimed in self._feeder.take_jobs():
            try:
                self._start(claimed)
            except Exception as error:
                code = "invalid_training_data" if isinstance(error, ValueError) else "server_error"
                self._fail(claimed.job.id, JobFailure(code, str(error)))
        for job_id in self._feeder.take_cancellations():
            if job_id in self._planner.loops:
                self._planner.remove(job_id)
                self._feeder.finish(job_id, partial(_cancelled, job_id))

    def _start(self, claimed: ClaimedJob) -> None:
        loop = TrainingLoop(
            claimed.job, claimed.dataset, self._planner.make_packs, self._base_model
        )
        self._planner.add(loop)
        logger.info(
            "finetuning job %s: %d examples, %d steps",
            claimed.job.id,
            len(claimed.dataset),
            loop.total_steps,
        )

    def apply(self, plan: StepPlan, result: StepResult | None) -> None:
        """Takes in what the worker answered to a plan."""
        result = result or StepResult()
        for job_id, failure in result.failures.items():
            self._fail(job_id, failure)
        for job_id, layout in result.started.items():
            try:
                self._planner.started(job_id, layout)
            except ValueError as error:
                self._fail(job_id, JobFailure("invalid_training_data", str(error)))
        for pack_id, loss in result.losses.items():
            self._planner.set_loss(pack_id, loss)
        for job_id, grad_norm in result.grad_norms.items():
            self._step_done(job_id, grad_norm)
        for job_id in result.saved:
            self._succeed(job_id)

    def _step_done(self, job_id: str, grad_norm: float) -> None:
        loop = self._planner.loops.get(job_id)
        if loop is None:
            return
        metrics = loop.step_done(grad_norm)
        self._stats.optimizer_step(
            job_id,
            step=loop.step,
            loss=metrics["train_loss"],
            grad_norm=grad_norm,
            tokens=metrics["tokens"],
        )
        step, total, tokens = loop.step, loop.total_steps, loop.trained_tokens

        def write(store: JobStore) -> None:
            store.record_progress(job_id, step, total, tokens)
            store.record_step(job_id, step, metrics)

        self._feeder.write(job_id, write)

    def _succeed(self, job_id: str) -> None:
        loop = self._planner.loops.get(job_id)
        if loop is None:
            return
        self._planner.remove(job_id)
        path = loop.job.folder / "adapter"
        self._feeder.finish(job_id, lambda store: store.succeed(job_id, path))

    def _fail(self, job_id: str, failure: JobFailure) -> None:
        logger.error("finetuning job %s failed: %s", job_id, failure.message)
        self._planner.remove(job_id)
        self._feeder.finish(job_id, lambda store: store.fail(job_id, failure.code, failure.message))

    def fail_all(self, error: Exception) -> None:
        """Ends every running job: the planner's state cannot be trusted after ``error``."""
        failure = JobFailure("server_error", f"{type(error).__name__}: {error}")
        for job_id in list(self._planner.loops):
            self._fail(job_id, failure)
        self._planner.reset()
