"""Predicts how long an iteration takes from what it holds, and learns from each one measured."""

import math
from dataclasses import dataclass
from operator import mul

import numpy as np

from flexllm_vllm.scheduler.margin import LATE_SHARE, Margin

# How far a coefficient may drift from one iteration to the next in which its term occurs, relative:
# a machine that slows down, or another mix of requests, is followed within tens of iterations.
DRIFT = 0.005
# Relative noise of a measured iteration.
NOISE = 0.05
# Relative errors beyond so many times the usual one count for less (Huber): a page fault or a
# neighbour on the machine says nothing of the next iteration.
OUTLIER = 3.0
# A coefficient stays within this factor of what the calibration found: whatever single iterations
# suggest, no machine becomes that much faster or slower at one thing alone. Unless the calibration
# could hardly tell: then within so many of its standard errors.
TRUST = 4.0
TRUST_ERRORS = 3.0
# Iterations after which a model that was not calibrated has found its costs.
SETTLED = 20
# An iteration's weight in the running mean of (the logarithm of) measured over predicted, the most
# that one counts in it, and the iterations from which is learnt how much of that mean goes on.
PACE_GAIN = 0.5
PACE_MEMORY = 256
MOST_PACE = math.log(2.0)


@dataclass(frozen=True, slots=True)
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
        backward_windows: backward windows, whatever their size: each reads a layer's weights.
        optimizer_steps: AdamW steps.
    """

    decode_rows: float = 0.0
    decode_context: float = 0.0
    prefill_tokens: float = 0.0
    has_finetuning_rows: float = 0.0
    forward_tokens: float = 0.0
    backward_tokens: float = 0.0
    backward_windows: float = 0.0
    optimizer_steps: float = 0.0

    @property
    def has_inference(self) -> bool:
        return self.decode_rows > 0 or self.prefill_tokens > 0

    @property
    def inference(self) -> "IterationWork":
        """Its part without finetuning."""
        return IterationWork(self.decode_rows, self.decode_context, self.prefill_tokens)

    @property
    def has_finetuning(self) -> bool:
        return self.forward_tokens > 0 or self.backward_tokens > 0

    @property
    def rows(self) -> float:
        """Rows of the fused forward."""
        return self.decode_rows + self.prefill_tokens + self.forward_tokens

    def terms(self, knee: float) -> tuple[float, ...]:
        """The terms of the model: the constant, whether there is a forward at all, its rows beyond
        the knee, the fields."""
        rows = self.rows
        return (1.0, float(rows > 0), rows - knee if rows > knee else 0.0, self.decode_rows,
                self.decode_context, self.prefill_tokens, self.has_finetuning_rows,
                self.forward_tokens, self.backward_tokens, self.backward_windows,
                self.optimizer_steps)  # fmt: skip


TERMS = ("constant", "has_rows", "rows_beyond_knee", *IterationWork.__dataclass_fields__)

_INDEX = {term: index for index, term in enumerate(TERMS)}

# Milliseconds of each term before anything was measured, and how far from the truth that may be:
# a small model on two cores. Wrong by far on a GPU, where the calibration corrects it.
_PRIOR_MS = np.array([1.0, 10.0, 0.1, 1.0, 1.0, 1.0, 5.0, 1.0, 2.0, 0.5, 20.0])
_PRIOR_SPREAD = 10.0 * _PRIOR_MS

# Candidates for the knee, which the calibration chooses from: up to so many rows a forward mostly
# waits for the weights, beyond it computes.
KNEES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


class LatencyModel:
    """A linear model whose coefficients are tracked by a Kalman filter, on relative errors.

    ``ms = c_0 + c . work``, each coefficient at least zero and, once calibrated, within
    :data:`TRUST` of the calibration. Every measured iteration updates it, at the cost of a few
    operations on a 11 x 11 matrix. A forward's rows have two coefficients, one for those beyond the
    knee alone: the first ones ride on the weights that are read for the others (the roofline).

    Args:
        late_share: of the iterations with output tokens, so many may be late by what it predicts.

    Attributes:
        knee: rows.
    """

    def __init__(self, late_share: float = LATE_SHARE) -> None:
        self.knee = float(KNEES[2])
        self._coefficients = _PRIOR_MS.copy()
        self._values: list[float] = _PRIOR_MS.tolist()
        self._covariance = np.diag(_PRIOR_SPREAD**2)
        self._most_spread = _PRIOR_SPREAD**2
        self._low = np.zeros(len(TERMS))
        self._high = np.full(len(TERMS), np.inf)
        self._floor = 0.1 * _PRIOR_MS
        self._usual_error = 0.2
        self._margin = Margin(late_share=late_share)
        self._recent = 0.0  # running mean of log(measured / predicted)
        self._recent_squared = self._recent_going_on = 0.0  # means of its square, its next error
        self._num_observed = 0

    @property
    def coefficients(self) -> dict[str, float]:
        """Milliseconds of one unit of each term."""
        return dict(zip(TERMS, self._values, strict=True))

    def calibrate(self, samples: list[tuple[IterationWork, float]]) -> None:
        """Starts from measured iterations: least squares on relative errors.

        Args:
            samples: iterations and their durations in milliseconds, with every term in them.

        Raises:
            ValueError: too few of them.
        """
        if len(samples) < len(TERMS):
            raise ValueError(f"{len(samples)} iterations cannot tell {len(TERMS)} terms")
        durations = np.array([duration_ms for _, duration_ms in samples])
        rows, found = self._fit(samples, durations)
        errors = _standard_errors(rows, found)
        # A term too small to be seen among the others may be as large as this.
        unseen = (
            0.002
            * float(np.median(durations))
            / np.maximum(1.0, (rows * durations[:, None]).max(axis=0))
        )
        self._coefficients = found
        self._values = found.tolist()
        least = np.maximum(0.0, found - TRUST_ERRORS * errors)
        most = found + TRUST_ERRORS * errors
        self._low = np.minimum(found / TRUST, least)
        self._high = np.maximum.reduce([found * TRUST, most, unseen])
        self._floor = np.maximum(0.1 * found, 0.1 * unseen)
        # Trusted within a quarter, or its standard error; the traffic will say the rest.
        self._most_spread = np.maximum.reduce([0.5 * found, errors, unseen]) ** 2
        self._covariance = np.diag(np.maximum.reduce([0.25 * found, errors, 0.5 * unseen]) ** 2)
        self._usual_error = float(np.mean(np.abs(rows @ found - 1.0)))

    def _fit(
        self, samples: list[tuple[IterationWork, float]], durations: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The terms of the samples over their durations, and the coefficients; chooses the knee."""
        ones, best = np.ones(len(samples)), math.inf
        most = max(work.rows for work, _ in samples)
        for knee in (k for k in KNEES if k < most or k == KNEES[0]):
            terms = np.array([work.terms(knee) for work, _ in samples]) / durations[:, None]
            coefficients = _nonnegative_least_squares(terms, ones)
            error = float(np.minimum(np.abs(terms @ coefficients - ones), 0.5).mean())
            if error < best:
                best, self.knee, rows, found = error, float(knee), terms, coefficients
        return rows, found

    def predict_ms(self, work: IterationWork) -> float:
        """Expected duration of an iteration."""
        return sum(map(mul, self._values, work.terms(self.knee)))

    def parts_ms(self, work: IterationWork) -> dict[str, float]:
        """The expected duration by term."""
        terms = work.terms(self.knee)
        return dict(zip(TERMS, map(mul, self._values, terms), strict=True))

    def cost_ms(self, term: str) -> float:
        """Expected milliseconds of one more unit of a term of :class:`IterationWork`."""
        return self._values[_INDEX[term]]

    @property
    def margin(self) -> float:
        """What a prediction, at the present pace, is multiplied by so that few iterations are late
        (see :class:`Margin`)."""
        return self._margin.value

    @property
    def pace(self) -> float:
        """How much longer than predicted iterations take at the moment.

        A machine that is shared is slow for a few iterations and then is not: of 800 mixed
        iterations on two cores of a Zen 4 successive ones had errors with a correlation of 0.46,
        the fifth after it 0.1. Who follows that needs less of a margin, there 1.31 instead of 1.48.
        How far to follow is the regression of the errors on their running mean: not at all where
        they have nothing to do with each other.
        """
        trust = self._recent_going_on / self._recent_squared if self._recent_squared else 0.0
        return math.exp(min(max(trust, 0.0), 1.0) * self._recent)

    @property
    def mape(self) -> float:
        """Mean absolute error of the last predictions, relative to the measured time."""
        return self._usual_error

    def observe(
        self, work: IterationWork, duration_ms: float, target_ms: float | None = None
    ) -> None:
        """Learns from a measured iteration, planned for a target if there was finetuning to do."""
        if not (math.isfinite(duration_ms) and duration_ms > 0):
            return
        self._num_observed += 1
        terms = np.array(work.terms(self.knee))
        predicted = self.predict_ms(work)
        ratio = duration_ms / max(predicted, 1e-3)
        if work.has_inference and work.has_finetuning:
            self._margin.learn(ratio / self.pace)
        if work.decode_rows and target_ms is not None:
            ours = work.has_finetuning or work.optimizer_steps > 0
            self._margin.was_late(duration_ms > target_ms, ours)
        error = abs(duration_ms - predicted) / duration_ms
        weight = 1.0
        if self._num_observed > SETTLED:
            self._learn_pace(min(max(math.log(ratio), -MOST_PACE), MOST_PACE))
            weight = min(1.0, OUTLIER * max(self._usual_error, 0.05) / max(error, 1e-9))
        self._update(terms, duration_ms, weight)
        self._usual_error += 0.02 * (min(error, 2.0) - self._usual_error)

    def observe_part(self, work: IterationWork, duration_ms: float) -> None:
        """Learns from a part of an iteration that was measured by itself: its backward windows."""
        if not (math.isfinite(duration_ms) and duration_ms > 0):
            return
        terms = np.array(work.terms(self.knee))
        terms[_INDEX["constant"]] = 0.0
        error = abs(duration_ms - float(self._coefficients @ terms)) / duration_ms
        weight = OUTLIER * max(self._usual_error, 0.05) / max(error, 1e-9)
        self._update(terms, duration_ms, min(1.0, weight))

    def _update(self, terms: np.ndarray, duration_ms: float, weight: float) -> None:
        x = terms / duration_ms
        error = 1.0 - float(self._coefficients @ x)
        spread = self._covariance @ x
        gain = spread * (weight / (NOISE**2 + weight * float(x @ spread)))
        moved = self._coefficients + gain * error
        self._coefficients = np.minimum(np.maximum(moved, self._low), self._high)
        self._values = self._coefficients.tolist()
        covariance = self._covariance - gain[:, None] * spread
        # Only what this iteration held can have drifted as far as it tells, and nothing is ever
        # less certain than at the start: hours without finetuning do not unlearn its cost.
        drift = DRIFT * np.maximum(self._coefficients, self._floor)
        diagonal = covariance.diagonal()
        widened = diagonal + np.where(terms != 0, drift * drift, 0.0)
        # Rounding must not make a variance negative.
        np.fill_diagonal(covariance, np.clip(widened, 1e-12, self._most_spread))
        self._covariance = covariance

    def _learn_pace(self, error: float) -> None:
        squared, going_on = self._recent * self._recent, self._recent * error
        self._recent_squared += (squared - self._recent_squared) / PACE_MEMORY
        self._recent_going_on += (going_on - self._recent_going_on) / PACE_MEMORY
        self._recent += PACE_GAIN * (error - self._recent)


def _standard_errors(rows: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How far each term may be from the truth, given the iterations' noise and what they held.

    Two sizes of one kind of work, say, leave its fixed cost all but open.

    Zero for a term that was found to be zero: nothing is known of it.
    """
    used = np.flatnonzero(found)
    errors = np.zeros(len(found))
    if len(used):
        noise = max(NOISE, float(np.median(np.abs(rows @ found - 1.0))))
        inverse = np.linalg.pinv(rows[:, used].T @ rows[:, used])
        errors[used] = noise * np.sqrt(np.maximum(inverse.diagonal(), 0.0))
    return errors


def _nonnegative_least_squares(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``x >= 0`` with ``rows @ x`` near ``wanted``: terms that come out negative are left out.

    Twice, the second time without the quarter of the rows that fit worst: a stall of the machine
    is no property of what ran.
    """
    kept = np.ones(len(rows), dtype=bool)
    for _ in range(2):
        used = list(range(rows.shape[1]))
        x = np.zeros(rows.shape[1])
        while used:
            part = np.linalg.lstsq(rows[kept][:, used], wanted[kept], rcond=None)[0]
            if (part >= 0).all():
                x[used] = part
                break
            used = [term for term, value in zip(used, part, strict=True) if value > 0]
        errors = np.abs(rows @ x - wanted)
        kept = errors <= max(float(np.quantile(errors, 0.75)), 0.02)
    return x
