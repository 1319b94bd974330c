"""What is learnt: how examples become batches, and what is published of their results."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from flexllm_vllm.data.dataset import TokenizedDataset
from flexllm_vllm.jobs.types import FinetuningJob
from flexllm_vllm.plan import PreferenceLoss
from flexllm_vllm.scheduler.pack import Pack


@dataclass
class Examples:
    """A data set, and what the base model thinks of it.

    Attributes:
        scores: log-probability of an example's targets without the adapter, as far as it is known.
    """

    dataset: TokenizedDataset
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.dataset.num_tokens(i) for i in range(len(self.dataset)))


class Objective(Protocol):
    """A training method.

    Attributes:
        width: examples of the data set that belong together: 1, or a pair of 2.
        needs_reference: an example must be scored under the base model before it is trained on.
    """

    width: int
    needs_reference: bool

    def denominator(self, num_items: int, num_loss_tokens: int) -> int:
        """What a batch's summed loss is divided by."""

    def preference(self, data: Examples, pack: Pack, num_items: int) -> PreferenceLoss | None:
        """The loss of a pack, where it is not the cross-entropy."""

    def train_metrics(self, packs: list[Pack], num_loss_tokens: int) -> dict[str, Any]:
        """What is published of an optimizer step beside its loss."""

    def evaluate(self, data: Examples, packs: list[Pack]) -> "EvaluationSums":
        """The sums of packs that were scored."""


def objective_of(job: FinetuningJob) -> Objective:
    """The method that a job trains by."""
    return Preference(job.training.beta) if job.method == "dpo" else Supervised()


class EvaluationSums:
    """Running sums over a validation set: loss and hits, of ``count`` tokens or pairs."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.count = 0
        self.correct = 0

    def add(self, other: "EvaluationSums") -> None:
        self.loss += other.loss
        self.count += other.count
        self.correct += other.correct

    def metrics(self) -> dict[str, Any]:
        """``valid_loss`` and ``valid_mean_token_accuracy``, OpenAI's names."""
        return {
            "valid_loss": self.loss / max(self.count, 1),
            "valid_mean_token_accuracy": self.correct / max(self.count, 1),
        }


class Supervised:
    """Cross-entropy of the tokens that carry loss."""

    width = 1
    needs_reference = False

    def denominator(self, num_items: int, num_loss_tokens: int) -> int:
        return num_loss_tokens

    def preference(self, data: Examples, pack: Pack, num_items: int) -> PreferenceLoss | None:
        return None

    def train_metrics(self, packs: list[Pack], num_loss_tokens: int) -> dict[str, Any]:
        correct = sum(pack.result.num_correct for pack in packs if pack.result)
        return {"train_mean_token_accuracy": correct / num_loss_tokens}

    def evaluate(self, data: Examples, packs: list[Pack]) -> EvaluationSums:
        sums = EvaluationSums()
        for pack in packs:
            assert pack.result is not None
            sums.loss += pack.result.loss
            sums.correct += pack.result.num_correct
            sums.count += sum(s.num_loss_tokens for s in pack.sequences)
        return sums


class Preference:
    """DPO on pairs, example ``2 i`` preferred to ``2 i + 1``; the reference is the base model.

    Scores under the reference are computed once for each example, as
    ``trl.DPOConfig.precompute_ref_log_probs`` does.
    """

    width = 2
    needs_reference = True

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def denominator(self, num_items: int, num_loss_tokens: int) -> int:
        return num_items

    def preference(self, data: Examples, pack: Pack, num_items: int) -> PreferenceLoss | None:
        reference = tuple(data.scores[s.example] for s in pack.sequences)
        return PreferenceLoss(self._beta, reference, num_items)

    def train_metrics(self, packs: list[Pack], num_loss_tokens: int) -> dict[str, Any]:
        """``trl.DPOTrainer``'s names."""
        rewards = [reward for pack in packs if pack.result for reward in pack.result.rewards]
        pairs = list(zip(rewards[0::2], rewards[1::2], strict=True))
        return {
            "rewards/chosen": _mean([chosen for chosen, _ in pairs]),
            "rewards/rejected": _mean([rejected for _, rejected in pairs]),
            "rewards/margins": _mean([chosen - rejected for chosen, rejected in pairs]),
            "rewards/accuracies": _mean([float(chosen > rejected) for chosen, rejected in pairs]),
        }

    def evaluate(self, data: Examples, packs: list[Pack]) -> EvaluationSums:
        """``valid_mean_token_accuracy`` is then the share of pairs that are ranked right."""
        sums = EvaluationSums()
        for pack in packs:
            assert pack.result is not None
            rewards = [
                self._beta * (logp - data.scores[s.example])
                for s, logp in zip(pack.sequences, pack.result.logps, strict=True)
            ]
            for chosen, rejected in zip(rewards[0::2], rewards[1::2], strict=True):
                sums.loss += _softplus(rejected - chosen)
                sums.correct += chosen > rejected
                sums.count += 1
        return sums


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
