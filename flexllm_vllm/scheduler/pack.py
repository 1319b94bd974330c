"""Finetuning sequences that share their backward windows."""

import bisect
import enum
import itertools
from dataclasses import dataclass, field

from vllm.v1.request import Request

from flexllm_vllm.plan import PackResult

_ids = itertools.count()


@dataclass
class Sequence:
    """One example, on its way through the forward.

    Attributes:
        token_ids: as the model reads them.
        targets: for each row the token that follows, or -1 where it carries no loss. The rows
            end with the last that carries loss: what follows has no gradient.
        done: rows whose forward is complete.
        request: vLLM's view of the sequence, while it holds KV blocks.
        example: its number in the data set.
    """

    token_ids: list[int]
    targets: tuple[int, ...]
    done: int = 0
    request: Request | None = None
    example: int = -1

    @classmethod
    def of(cls, token_ids: list[int], loss_mask: list[int], example: int = -1) -> "Sequence":
        """The rows of an example; ``loss_mask[t]`` says that token ``t`` is to be predicted."""
        targets = [
            token if mask else -1 for token, mask in zip(token_ids[1:], loss_mask[1:], strict=True)
        ]
        while targets and targets[-1] < 0:
            targets.pop()
        return cls(token_ids[: len(targets) + 1], tuple(targets), example=example)

    @property
    def num_rows(self) -> int:
        return len(self.targets)

    @property
    def num_loss_tokens(self) -> int:
        return len(self.targets) - self.targets.count(-1)

    def num_blocks(self, block_size: int) -> int:
        """KV blocks that the whole sequence needs."""
        return -(-self.num_rows // block_size)


class PackPhase(enum.Enum):
    WAITING = enum.auto()
    FORWARD = enum.auto()
    BACKWARD = enum.auto()
    DONE = enum.auto()


@dataclass
class Pack:
    """Sequences of one optimizer batch that run backward as if concatenated.

    Attributes:
        job_id: the job it belongs to.
        pack_id: new for every attempt, so that the worker never mixes two of them.
        pages: of the activation cache, while the pack is open.
        layers: backward: the first layer that runs and the last one, downwards.
        layer: backward: the layer that is running; ``num_layers`` is the loss head and the number
            above it the score.
        row: backward: rows ``[0, row)`` of that layer are still to be done.
        result: of its loss head or score, None until the worker has reported it.
        num_rows: of all its sequences; the planner asks for it at every window.
        losses: rows that carry loss, before each row and before the end.
    """

    job_id: str
    sequences: list[Sequence]
    pack_id: int = field(default_factory=lambda: next(_ids))
    phase: PackPhase = PackPhase.WAITING
    pages: tuple[int, ...] = ()
    layers: tuple[int, int] = (0, 0)
    layer: int = -1
    row: int = 0
    result: PackResult | None = None
    num_rows: int = field(init=False)
    losses: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_rows = sum(s.num_rows for s in self.sequences)
        carry = (target >= 0 for s in self.sequences for target in s.targets)
        self.losses = list(itertools.accumulate(carry, initial=0))

    def rows_with(self, num_losses: int, end: int) -> int:
        """Rows before row ``end``, as many as there are with so many losses among them."""
        return end - bisect.bisect_left(self.losses, self.losses[end] - num_losses, 0, end)

    def run_with_loss(self, end: int) -> int:
        """Where the rows that carry loss up to row ``end``, and those without before them, begin.
        Where the last row carries none: where its like begin."""
        start = end
        for carry in (True, False) if self._carries_loss(end - 1) else (False,):
            while start and self._carries_loss(start - 1) is carry:
                start -= 1
        return start

    def _carries_loss(self, row: int) -> bool:
        return self.losses[row + 1] > self.losses[row]

    def num_blocks(self, block_size: int) -> int:
        """KV blocks that all its sequences need."""
        return sum(s.num_blocks(block_size) for s in self.sequences)

    @property
    def is_open(self) -> bool:
        """It holds KV blocks and pages of the activation cache."""
        return self.phase in (PackPhase.FORWARD, PackPhase.BACKWARD)

    def begin_backward(self) -> None:
        self.phase = PackPhase.BACKWARD
        self.layer = self.layers[0]
        self.row = self.num_rows

    def restart(self) -> None:
        """Back to the start, as a new attempt."""
        self.pack_id = next(_ids)
        self.phase = PackPhase.WAITING
        self.result = None
        for sequence in self.sequences:
            sequence.done = 0


def make_packs(
    job_id: str,
    items: list[list[Sequence]],
    max_rows: int,
    max_blocks: int,
    block_size: int,
) -> list[Pack]:
    """Splits a batch, in order, into packs.

    Args:
        job_id: owner.
        items: of the batch; sequences of one item stay together.
        max_rows: tokens a pack may hold; a longer item gets a pack of its own.
        max_blocks: KV blocks a pack may hold, likewise.
        block_size: tokens of a KV block.
    """
    packs: list[list[Sequence]] = []
    rows = blocks = 0  # of the last pack
    for item in items:
        more_rows = sum(sequence.num_rows for sequence in item)
        more_blocks = sum(sequence.num_blocks(block_size) for sequence in item)
        rows, blocks = rows + more_rows, blocks + more_blocks
        if packs and rows <= max_rows and blocks <= max_blocks:
            packs[-1] += item
        else:
            packs.append(list(item))
            rows, blocks = more_rows, more_blocks
    return [Pack(job_id, sequences) for sequences in packs]
