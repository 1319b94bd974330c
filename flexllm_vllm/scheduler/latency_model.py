"""Predicts how long an iteration takes from what it holds, and learns from each one measured."""

from collections import deque
from dataclasses import astuple, dataclass, fields

import numpy as np

# How far a coefficient may drift from one iteration to the next in which its term occurs, relative:
# a machine that slows down, or another mix of requests, is followed within tens of iterations.
DRIFT = 0.005
# Relative noise of a measured iteration.
NOISE = 0.05
# Relative residuals beyond so many times the usual one count for less (Huber): a page fault or a
# neighbour on the machine says nothing of the next iteration.
OUTLIER = 3.0
# Iterations that a margin is learnt from, and before which it is MARGIN_AT_START.
RESIDUALS = 256
MIN_RESIDUALS = 24
MARGIN_AT_START = 1.5
# A machine that stalls for seconds does so whatever an iteration holds: holding less is no cure.
MAX_MARGIN = 1.5


@dataclass(frozen=True)
class IterationWork:
    """What an iteration holds.

    Attributes:
        decode_rows: inference tokens of requests past their prompt.
        decode_context: K/V entries that they read, in thousands.
        prefill_tokens: inference tokens of prompts.
        has_finetuning_rows: 1 if the forward holds finetuning tokens, else 0: such a forward runs
            eagerly and through the LoRA products.
        forward_tokens: finetuning tokens of the fused forward.
        backward_tokens: token-layers run backward, divided by the number of layers; the loss head
            counts as so many layers as it costs.
        optimizer_steps: AdamW steps.
    """

    decode_rows: float = 0.0
    decode_context: float = 0.0
    prefill_tokens: float = 0.0
    has_finetuning_rows: float = 0.0
    forward_tokens: float = 0.0
    backward_tokens: float = 0.0
    optimizer_steps: float = 0.0

    @property
    def has_inference(self) -> bool:
        return self.decode_rows > 0 or self.prefill_tokens > 0

    @property
    def has_finetuning(self) -> bool:
        return self.forward_tokens > 0 or self.backward_tokens > 0


# Milliseconds of each term before anything was measured, and how far from the truth that may be:
# a small model on two cores. The first iterations correct it.
_PRIOR_MS = np.array([10.0, 1.0, 1.0, 1.0, 5.0, 1.0, 2.0, 20.0])
_PRIOR_SPREAD = 10.0 * _PRIOR_MS


class LatencyModel:
    """A linear model whose coefficients are tracked by a Kalman filter, on relative errors.

    ``ms = c_0 + c . work``, each coefficient at least zero. Every measured iteration updates it, at
    the cost of a few operations on an 8 x 8 matrix.
    """

    def __init__(self) -> None:
        self._coefficients = _PRIOR_MS.copy()
        self._covariance = np.diag(_PRIOR_SPREAD**2)
        self._usual_error = 0.2
        self._ratios: deque[float] = deque(maxlen=RESIDUALS)
        self._margin = MARGIN_AT_START
        self.num_observed = 0

    def predict_ms(self, work: IterationWork) -> float:
        """Expected duration of an iteration."""
        return float(np.maximum(self._coefficients, 0.0) @ _features(work))

    def cost_ms(self, term: str) -> float:
        """Expected milliseconds of one more unit of a term of :class:`IterationWork`."""
        index = 1 + [f.name for f in fields(IterationWork)].index(term)
        return float(max(self._coefficients[index], 0.0))

    @property
    def margin(self) -> float:
        """What a prediction is multiplied by so that 99 of 100 mixed iterations stay below it."""
        return self._margin

    @property
    def mape(self) -> float:
        """Mean absolute error of the last predictions, relative to the measured time."""
        return self._usual_error

    def observe(self, work: IterationWork, duration_ms: float) -> None:
        """Learns from a measured iteration."""
        predicted = self.predict_ms(work)
        self.num_observed += 1
        if work.has_inference and work.has_finetuning:
            self._ratios.append(duration_ms / max(predicted, 1e-3))
            if len(self._ratios) >= MIN_RESIDUALS:
                self._margin = min(MAX_MARGIN, float(np.quantile(self._ratios, 0.99)))
        x = _features(work) / duration_ms
        error = 1.0 - float(self._coefficients @ x)
        limit = OUTLIER * max(self._usual_error, 0.05)
        weight = min(1.0, limit / max(abs(error), 1e-9)) if self.num_observed > 20 else 1.0
        spread = self._covariance @ x
        gain = spread * (weight / (NOISE**2 + weight * float(x @ spread)))
        self._coefficients = self._coefficients + gain * error
        covariance = self._covariance - np.outer(gain, spread)
        # Only what this iteration held can have drifted as far as it tells, and nothing is ever
        # less certain than at the start: hours without finetuning do not unlearn its cost.
        drift = DRIFT * np.maximum(np.abs(self._coefficients), 0.1 * _PRIOR_MS)
        open_ = (x != 0) & (np.diag(covariance) < _PRIOR_SPREAD**2)
        self._covariance = (covariance + covariance.T) / 2 + np.diag(np.where(open_, drift**2, 0))
        shown = min(abs(duration_ms - predicted) / duration_ms, 2.0)
        self._usual_error += 0.02 * (shown - self._usual_error)


def _features(work: IterationWork) -> np.ndarray:
    return np.array((1.0, *astuple(work)))
