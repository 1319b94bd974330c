"""The finetuning scheduler with the windows that a test asks for, in the job's metadata."""

from typing import Any

from flexllm_vllm.scheduler import FinetuningScheduler


class WindowScheduler(FinetuningScheduler):
    """``metadata={"window": "7"}`` cuts every forward and backward into windows of 7 tokens."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        windows = [
            int(loop.job.metadata["window"])
            for loop in self._planner.loops.values()
            if loop.job.metadata and "window" in loop.job.metadata
        ]
        self._planner.min_window = 1
        self._planner.max_window = windows[0] if windows else None
        return super().schedule(*args, **kwargs)
