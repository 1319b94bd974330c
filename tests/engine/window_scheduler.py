"""The finetuning scheduler with the windows that a test asks for, in the job's metadata."""

import random
from typing import Any

from flexllm_vllm.scheduler import AsyncFinetuningScheduler, FinetuningScheduler


class _Windows:
    """``metadata={"window": "7"}`` cuts every forward and backward into windows of 7 tokens,
    ``{"window": "random"}`` into windows that change from iteration to iteration."""

    _random = random.Random(0)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        windows = [
            self._random.choice((1, 3, 11, 40, 200)) if window == "random" else int(window)
            for loop in self._planner.loops.values()
            if loop.job.metadata and (window := loop.job.metadata.get("window"))
        ]
        self._planner.bounds.least = 1
        self._planner.bounds.most = windows[0] if windows else None
        return super().schedule(*args, **kwargs)


class WindowScheduler(_Windows, FinetuningScheduler):
    pass


class AsyncWindowScheduler(_Windows, AsyncFinetuningScheduler):
    """Knows how many iterations were in flight at once (:meth:`finetuning_stats`)."""

    _most_in_flight = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        self._most_in_flight = max(self._most_in_flight, self._recorder.num_in_flight)
        return output

    def finetuning_stats(self) -> dict[str, Any]:
        return {**super().finetuning_stats(), "most_in_flight": self._most_in_flight}
