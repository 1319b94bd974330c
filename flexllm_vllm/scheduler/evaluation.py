"""An evaluation of a job's adapter, and what follows from its result."""

from dataclasses import dataclass, field
from typing import Any

from flexllm_vllm.scheduler.objective import EvaluationSums

# Items that are opened at once: their tokens are lists while they run.
CHUNK = 16


@dataclass
class Evaluation:
    """The validation set, once through.

    Attributes:
        num_items: examples, or pairs.
        step: optimizer step after which it runs.
    """

    num_items: int
    step: int
    sums: EvaluationSums = field(default_factory=EvaluationSums)
    _taken: int = 0

    def take(self) -> list[int] | None:
        """The next items; None when all were taken."""
        items = list(range(self._taken, min(self._taken + CHUNK, self.num_items)))
        self._taken += len(items)
        return items or None

    @property
    def complete(self) -> bool:
        """All items were taken (and, between two batches, added to the sums)."""
        return self._taken == self.num_items


@dataclass
class Progress:
    """What training has come to; stored in checkpoints, so that it goes on from there.

    Attributes:
        step: optimizer steps done.
        trained_tokens: of the examples of all steps.
        evaluated_step, served_step: steps of the last evaluation, and of the last checkpoint that
            is served; 0 before the first.
        best_loss, best_step: of the best evaluation.
        bad_evaluations: since then.
        stopped: early.
        metrics: of the last step and its evaluation, in OpenAI's names.
    """

    step: int = 0
    trained_tokens: int = 0
    evaluated_step: int = 0
    served_step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    bad_evaluations: int = 0
    stopped: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)

    def evaluated(self, step: int, metrics: dict[str, Any], patience: int | None) -> None:
        """Takes in an evaluation; ``patience`` evaluations that are no better end the training."""
        self.evaluated_step = step
        self.metrics |= {
            **metrics,
            "full_valid_loss": metrics["valid_loss"],
            "full_valid_mean_token_accuracy": metrics["valid_mean_token_accuracy"],
        }
        if self.best_loss is None or metrics["valid_loss"] < self.best_loss:
            self.best_loss, self.best_step, self.bad_evaluations = metrics["valid_loss"], step, 0
        else:
            self.bad_evaluations += 1
        self.stopped = patience is not None and self.bad_evaluations >= patience
