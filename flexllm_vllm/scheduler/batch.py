"""Examples that go through the model together."""

import enum
from dataclasses import dataclass

from flexllm_vllm.plan import PackResult
from flexllm_vllm.scheduler.pack import Pack, PackPhase


class BatchKind(enum.Enum):
    """What a batch is for.

    TRAIN ends with an optimizer step; SCORE asks for log-probabilities under the adapter,
    REFERENCE for those under the base model.
    """

    TRAIN = enum.auto()
    SCORE = enum.auto()
    REFERENCE = enum.auto()

    @property
    def is_trained(self) -> bool:
        return self is BatchKind.TRAIN


@dataclass
class Batch:
    """The examples of one optimizer step, or of a part of an evaluation.

    Attributes:
        packs: in the order in which they run.
        num_tokens: of the examples, as they are counted and billed.
        num_loss_tokens: of them, those that carry loss.
        denominator: what the summed loss is divided by: loss-bearing tokens, or pairs.
    """

    packs: list[Pack]
    num_tokens: int
    num_loss_tokens: int
    denominator: int
    kind: BatchKind = BatchKind.TRAIN

    @property
    def done(self) -> bool:
        """All work of every pack is planned."""
        return all(pack.phase is PackPhase.DONE for pack in self.packs)

    @property
    def results(self) -> list[PackResult]:
        """What the worker has reported, in the order of the packs."""
        return [pack.result for pack in self.packs if pack.result is not None]

    @property
    def reported(self) -> bool:
        """The worker has reported every pack."""
        return len(self.results) == len(self.packs)

    @property
    def loss(self) -> float:
        """Mean loss of what was reported."""
        return sum(result.loss for result in self.results) / self.denominator
