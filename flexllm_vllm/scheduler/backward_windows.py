"""Cuts the backward of packs into windows."""

from dataclasses import dataclass

from flexllm_vllm.plan import BackwardWindow, StepPlan, aligned
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.open_packs import OpenPacks
from flexllm_vllm.scheduler.pack import Pack, PackPhase
from flexllm_vllm.scheduler.training_loop import TrainingLoop

# Smaller windows than this leave the GEMMs bound by reading the weights: on 2 cores 16 tokens run
# at a third of the speed of 128 (29 against 80 GFLOP/s).
MIN_WINDOW = 16
# The loss head costs as much as many layers: windows of it may be so many times smaller.
HEAD_FRACTION = 4


@dataclass(frozen=True)
class ModelShape:
    """What the planner must know of the model.

    Attributes:
        num_layers: decoder layers.
        loss_head_layers: cost of a token's loss head, in decoder layers.
    """

    num_layers: int
    loss_head_layers: float


@dataclass
class WindowBounds:
    """Sizes of windows.

    Attributes:
        least: a smaller backward window is not cut, even where the budget ends before.
        most: a larger forward or backward window is not planned; None for no bound.
    """

    least: int = MIN_WINDOW
    most: int | None = None

    def size(self, remaining: int, wanted: int) -> int:
        """Of a window that begins with ``remaining`` tokens to go."""
        size = wanted if wanted < remaining else remaining
        return size if self.most is None else min(size, self.most)


class BackwardWindows:
    """Plans the backward, of each job one pack at a time.

    Args:
        shape: of the model.
        packs: that hold something.
        bounds: of the windows.
    """

    def __init__(self, shape: ModelShape, packs: OpenPacks, bounds: WindowBounds) -> None:
        self._shape = shape
        self._packs = packs
        self._bounds = bounds
        head = shape.loss_head_layers
        self._layer_costs = (*(1.0,) * shape.num_layers, head, head / 2)

    def fill(self, loop: TrainingLoop, limit: float, budget: Budget, plan: StepPlan) -> float:
        """Plans the next backward windows of a job.

        As few layers of as many tokens as possible: a window reads the weights of its layer,
        whatever its size.

        Args:
            loop: of the job.
            limit: what they may cost.
            budget: of the iteration.
            plan: takes them.

        Returns:
            What they cost.
        """
        used = 0.0
        head = self._shape.num_layers
        per_layer = budget.backward / head  # of a token in one layer
        first = not plan.backward
        for pack in loop.batch.packs if loop.batch else []:
            if pack.phase is PackPhase.DONE:
                continue
            done = 0.0  # token-layers
            while pack.phase is PackPhase.BACKWARD and used < limit:
                whole = budget.window + pack.num_rows * per_layer
                if count := self._whole_layers(pack, limit - used, whole):
                    first = False
                    lowest = pack.layer - count + 1
                    plan.backward.append(
                        BackwardWindow(pack.pack_id, pack.layer, 0, pack.num_rows, lowest)
                    )
                    used += count * whole
                    done += count * pack.num_rows
                    pack.layer = lowest
                    self.advance(pack, pack.row)
                    continue
                layers = self._layer_costs[pack.layer]
                wanted = int((limit - used - budget.window) / (per_layer * layers))
                window = self._cut(pack, wanted, may_wait=not first)
                if window is None:
                    break
                first = False
                plan.backward.append(window)
                used += budget.window + window.num_token_layers * per_layer * layers
                done += window.num_token_layers * layers
                self.advance(pack, window.end - window.start)
            if done:
                self.serve(loop, done)
            if pack.phase is PackPhase.BACKWARD:
                break
        return used

    def serve(self, loop: TrainingLoop, token_layers: float) -> None:
        """Counts a job's backward; of the loss head as so many layers as it costs."""
        loop.serve(token_layers * 2 / (3 * self._shape.num_layers))

    def window(self, pack: Pack, layer: int, start: int, end: int) -> BackwardWindow:
        """Rows of a pack in one layer."""
        is_head = layer >= self._shape.num_layers
        costly = pack.losses[end] - pack.losses[start] if is_head else None
        return BackwardWindow(pack.pack_id, layer, start, end, layer, costly)

    def least(self, layer: int) -> int:
        """Rows of a window of this layer, at least."""
        is_head = layer >= self._shape.num_layers
        return -(-self._bounds.least // HEAD_FRACTION) if is_head else self._bounds.least

    def _cut(self, pack: Pack, wanted: int, may_wait: bool) -> BackwardWindow | None:
        """The next window of a pack within one layer, of so many rows that cost something; None if
        that is too few."""
        end, layer = pack.row, pack.layer
        is_head = layer >= self._shape.num_layers
        remaining = pack.losses[end] if is_head else end
        least = self.least(layer)
        if wanted < remaining and wanted < least and may_wait:
            return None
        wanted = max(wanted, least)
        size = self._bounds.size(end, pack.rows_with(wanted, end) if is_head else wanted)
        start = end - size
        if not is_head and aligned(start, least) < end:
            start = aligned(start, least)
        return self.window(pack, layer, start, end)

    def _whole_layers(self, pack: Pack, limit: float, cost: float) -> int:
        """Decoder layers of a pack that fit whole into what is left, from its present one on; each
        would be a window of its own otherwise."""
        if pack.layer >= self._shape.num_layers or pack.row < pack.num_rows:
            return 0
        if self._bounds.most is not None and pack.num_rows > self._bounds.most:
            return 0
        left = pack.layer - pack.layers[1] + 1
        return left if left * cost <= limit else int(limit / cost)

    def layers(self, layer: int) -> float:
        """Cost of a layer's backward in decoder layers; ``num_layers`` is the loss head, and the
        score above it is half of that: the logits, and nothing through them."""
        return self._layer_costs[layer]

    def advance(self, pack: Pack, num_rows: int) -> None:
        """So many rows more of its present layer are planned, or done."""
        pack.row -= num_rows
        if pack.row:
            return
        pack.layer -= 1
        pack.row = pack.num_rows
        if pack.layer < pack.layers[1]:
            # The worker runs backward windows before the forward (optional ones have run): blocks
            # and pages are free for the forward windows of this very iteration.
            self._packs.finish(pack)
