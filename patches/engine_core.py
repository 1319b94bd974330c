"""Introduces the scheduler to the engine core that runs it.

The finetuning scheduler must know when the engine is shutting down (finetuning is no work to wait
for then, but a checkpoint is written in the end), must wake it when a job arrives while it sleeps,
and has a record of its iterations and counters that the API asks for. It refuses a request for an
adapter that was deleted, as it arrives: to load it would end the engine. Why a patch: a scheduler
is given no reference to its engine, the engine answers only to its own methods, and a scheduler
cannot refuse a request.
Fits vLLM 0.32 (``vllm/v1/engine/core.py``). Applied when the scheduler is imported, so only in
engines that finetune; raises there if the loop is gone.
"""

import functools
from typing import Any

from flexllm_vllm.frame_stack import with_room
from flexllm_vllm.patches import require


def apply() -> None:
    """Wraps ``run_busy_loop`` and ``preprocess_add_request`` of ``EngineCoreProc``, and adds
    ``finetuning_iterations``, ``finetuning_stats`` and ``finetuning_adapters_in_use``; once."""
    from vllm.v1.engine.core import EngineCoreProc

    run = require(EngineCoreProc, "run_busy_loop")
    if getattr(run, "_finetuning", False):
        return

    @functools.wraps(run)
    def run_attached(self: Any) -> None:
        if hasattr(self.scheduler, "attach_engine"):
            self.scheduler.attach_engine(self)
        try:
            # Its workers, where they are of the same process, and the scheduler.
            with_room(run)(self)
        except SystemExit:
            # The regular end. Workers are still alive; whatever else ends the loop, they may not.
            if hasattr(self.scheduler, "detach_engine"):
                self.scheduler.detach_engine(self)
            raise

    preprocess = require(EngineCoreProc, "preprocess_add_request")

    @functools.wraps(preprocess)
    def preprocess_checked(self: Any, request: Any) -> Any:
        # What this raises is the error of this request alone.
        if request.lora_request is not None and hasattr(self.scheduler, "check_adapter"):
            self.scheduler.check_adapter(request.lora_request)
        return preprocess(self, request)

    def finetuning_iterations(self: Any, last: int) -> list[dict[str, Any]]:
        return self.scheduler.finetuning_iterations(last)

    def finetuning_stats(self: Any) -> dict[str, Any]:
        return {"engine": self.engine_index, **self.scheduler.finetuning_stats()}

    def finetuning_adapters_in_use(self: Any) -> list[int]:
        return self.scheduler.finetuning_adapters_in_use()

    run_attached._finetuning = True  # type: ignore[attr-defined]
    EngineCoreProc.run_busy_loop = run_attached
    EngineCoreProc.preprocess_add_request = preprocess_checked
    EngineCoreProc.finetuning_iterations = finetuning_iterations
    EngineCoreProc.finetuning_stats = finetuning_stats
    EngineCoreProc.finetuning_adapters_in_use = finetuning_adapters_in_use
