"""The finetuning scheduler and worker, with code of a job that raises where a test asks for it.

A fault strikes while at least :data:`STREAMS` requests are in the batch, and not before the job's
third step, so that it meets a job in full swing, beside requests.
"""

from collections.abc import Callable
from typing import Any

from flexllm_vllm.scheduler import FinetuningScheduler
from flexllm_vllm.scheduler.training_loop import TrainingLoop
from flexllm_vllm.worker.cpu import FinetuningCPUWorker

STREAMS = 15
MESSAGE = "injected"


class InjectedError(Exception):
    """Of no type that our code could expect."""


def raising(working: Callable[..., Any], strikes: Callable[..., bool]) -> Callable[..., Any]:
    """``working``, which raises where ``strikes`` says so of its arguments."""

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if strikes(*args):
            raise InjectedError(MESSAGE)
        return working(*args, **kwargs)

    return faulty


class FaultScheduler(FinetuningScheduler):
    """``metadata={"fault": "<place>"}`` breaks that part of a job in the engine's process."""

    PLACES = ("data", "scheduling", "results", "evaluation", "store", "checkpoint-kept")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        planner, store = self._planner, self._feeder._store
        planner.add = self._breaking(planner.add)
        # Beside requests the backward is offered until a deadline.
        planner.optional.offer = raising(
            planner.optional.offer, lambda loop, *_: self._strikes(loop, "scheduling")
        )
        store.record_step = raising(
            store.record_step, lambda job_id, *_: self._strikes_id(job_id, "store")
        )
        # Called for a checkpoint that is complete, by the name of its job.
        store.checkpoint_steps = raising(
            store.checkpoint_steps, lambda job_id: self._strikes_id(job_id, "checkpoint-kept")
        )

    def _strikes(self, loop: TrainingLoop, place: str) -> bool:
        asked = (loop.job.metadata or {}).get("fault")
        return asked == place and len(self.running) >= STREAMS and loop.progress.step >= 2

    def _strikes_id(self, job_id: str, place: str) -> bool:
        loop = self._planner.loops.get(job_id)
        return loop is not None and self._strikes(loop, place)

    def _breaking(self, add: Callable[[TrainingLoop], None]) -> Callable[[TrainingLoop], None]:
        """Breaks what belongs to one job when it is added."""

        def add_broken(loop: TrainingLoop) -> None:
            add(loop)
            for owner, name, place in (
                (loop.dataset, "example", "data"),
                (loop, "step_done", "results"),
                (loop.objective, "evaluate", "evaluation"),
            ):
                working = getattr(owner, name)
                strikes = lambda *_, place=place: self._strikes(loop, place)  # noqa: E731
                setattr(owner, name, raising(working, strikes))

        return add_broken


class FaultWorker(FinetuningCPUWorker):
    """:meth:`break_job` breaks that part of a job in the worker's process."""

    PLACES = ("backward", "capture", "optimizer", "checkpoint")

    _num_rows = 0

    def execute_model(self, scheduler_output: Any) -> Any:
        self._num_rows = len(scheduler_output.num_scheduled_tokens)
        return super().execute_model(scheduler_output)

    def break_job(self, job_id: str, place: str) -> None:
        """Lets the code of a running job raise from now on."""
        trainer = self._trainer
        adapter = trainer.adapters[job_id]

        def strikes(*_: Any) -> bool:
            return self._num_rows >= STREAMS

        if place == "backward":
            model = trainer.model
            model.layer_backward = raising(
                model.layer_backward,
                lambda layer, *rest: layer == 1 and rest[-1] is adapter and strikes(),
            )
        elif place == "capture":
            cache = trainer._cache
            cache.write = raising(
                cache.write,
                lambda kept, key, *_: key[0] == 1 and strikes() and job_id == next(
                    c.job_id for c in trainer._captures if c.kept is kept
                ),
            )  # fmt: skip
        else:
            name = {"optimizer": "step", "checkpoint": "snapshot"}[place]
            setattr(adapter, name, raising(getattr(adapter, name), strikes))
