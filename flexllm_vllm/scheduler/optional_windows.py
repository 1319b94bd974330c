"""The backward that an iteration holds as far as there is time: the worker ends it at a deadline.

How long an iteration takes is known when it is over. What is planned to end in time 99 times in 100
on a machine that is shared leaves a third of the usual iteration unused; what may be cut short does
not. The forward cannot be cut, the backward can, after any row.
"""

from collections.abc import Iterator

from flexllm_vllm.plan import BackwardWindow, OptionalWindow, StepPlan
from flexllm_vllm.scheduler.backward_windows import BackwardWindows, ModelShape, WindowBounds
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.pack import Pack, PackPhase
from flexllm_vllm.scheduler.training_loop import TrainingLoop


class OptionalWindows:
    """Offers the backward of packs to the worker, and takes in what of it was run.

    Args:
        shape: of the model.
        backward: follows how far a pack is.
        bounds: of the windows.
    """

    def __init__(self, shape: ModelShape, backward: BackwardWindows, bounds: WindowBounds) -> None:
        self._shape = shape
        self._backward = backward
        self._bounds = bounds

    @staticmethod
    def is_ready(loop: TrainingLoop) -> bool:
        """Whether a pack of a job waits for its backward."""
        packs = loop.batch.packs if loop.batch else []
        return any(pack.phase is PackPhase.BACKWARD for pack in packs)

    def offer(self, loop: TrainingLoop, limit: float, budget: Budget, plan: StepPlan) -> float:
        """Plans a job's windows for a cost of ``limit``; returns what they cost.

        Nothing is taken for done (see :meth:`ran`).
        """
        used = 0.0
        for optional in self._of_job(loop, budget):
            if used >= limit:
                break
            plan.optional.append(optional)
            used += optional.cost_ms
        return used

    def _of_job(self, loop: TrainingLoop, budget: Budget) -> Iterator[OptionalWindow]:
        """All that is left of packs that are through their forward, one after the other."""
        for pack in loop.batch.packs if loop.batch else []:
            if pack.phase is PackPhase.BACKWARD:
                yield from self._of_pack(pack, budget)
            elif pack.phase is not PackPhase.DONE:
                break

    def _of_pack(self, pack: Pack, budget: Budget) -> Iterator[OptionalWindow]:
        """As many rows of a layer as possible: a window reads its weights, whatever its size."""
        end = pack.row
        for layer in range(pack.layer, pack.layers[1] - 1, -1):
            row_ms = budget.backward / self._shape.num_layers * self._backward.layers(layer)
            while end:
                window, least = self._next(pack, layer, end)
                yield OptionalWindow(window, budget.window, row_ms, least)
                end = window.start
            end = pack.num_rows

    def _next(self, pack: Pack, layer: int, end: int) -> tuple[BackwardWindow, int]:
        """The window before row ``end``, and how many of its rows must run at least.

        Those of the loss head that cost something are the last ones, so that it can be cut after
        any; where there are few in a row, some are one window that is not cut.
        """
        least, start = self._backward.least(layer), 0
        if layer >= self._shape.num_layers:
            start = pack.run_with_loss(end)
            if start and 0 < pack.losses[end] - pack.losses[start] < self._bounds.least:
                start = end - pack.rows_with(self._bounds.least, end)
                least = pack.losses[end] - pack.losses[start]
        start = end - self._bounds.size(end - start, end - start)
        return self._backward.window(pack, layer, start, end), least

    def ran(self, loop: TrainingLoop, pack: Pack, window: BackwardWindow) -> None:
        """The worker has run a window, or its last rows."""
        assert (window.layer, window.end) == (pack.layer, pack.row)
        whole = self._backward.window(pack, window.layer, window.start, window.end)
        token_layers = whole.num_token_layers * self._backward.layers(window.layer)
        self._backward.serve(loop, token_layers)
        self._backward.advance(pack, window.end - window.start)
