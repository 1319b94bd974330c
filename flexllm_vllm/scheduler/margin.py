"""How much longer than planned an iteration must be expected to take."""

from bisect import bisect_left, insort
from collections import deque

# Iterations that the margin is learnt from, and before which it is MARGIN_AT_START.
RESIDUALS = 512
MIN_RESIDUALS = 32
MARGIN_AT_START = 1.2
# A machine that stalls for seconds does so whatever an iteration holds: holding less is no cure.
MAX_MARGIN = 1.5
# Of the iterations with output tokens so many may be late: a little below the hundredth that is
# promised, for what happens on a token's way to the client.
LATE_SHARE = 0.008
# What is late without finetuning, by the prompts of other requests, is taken off that, but so much
# of it remains: beyond it, less finetuning is no cure.
LEAST_LATE_SHARE = 0.25
# How far one iteration moves the share of the residuals that may lie beyond the margin, where it
# begins, and between what it stays.
GAIN = 0.002
BEYOND_AT_START = 0.005
LEAST_BEYOND, MOST_BEYOND = 0.001, 0.03


class Margin:
    """A quantile of measured over planned durations, chosen by how many iterations are late.

    Which quantile leaves a given share of all iterations in time is not known beforehand: parts of
    an iteration are not planned to the last millisecond. So the share beyond it is moved after
    every iteration, down where finetuning made it late and up where not, by steps that balance at
    ``late_share``: adaptive conformal inference (Gibbs and Candes, arXiv 2106.00170, equation 2).

    Args:
        at_start: before enough was measured.
        most: that it may be.
        late_share: of the iterations with output tokens, so many may be late.
        beyond: at the start.

    Attributes:
        value: the factor, at least 1.
        beyond: share of the residuals that may lie above it.
    """

    def __init__(
        self,
        at_start: float = MARGIN_AT_START,
        most: float = MAX_MARGIN,
        late_share: float = LATE_SHARE,
        beyond: float = BEYOND_AT_START,
    ) -> None:
        self.value = at_start
        self._most = most
        self._late_share = late_share
        self.beyond = beyond
        self._late_anyway = 0.0  # running share of the iterations that are late without finetuning
        self._ratios: deque[float] = deque(maxlen=RESIDUALS)
        self._sorted: list[float] = []

    def learn(self, ratio: float) -> None:
        """Takes in an iteration with requests and finetuning: measured over planned."""
        if len(self._ratios) == RESIDUALS:
            del self._sorted[bisect_left(self._sorted, self._ratios[0])]
        self._ratios.append(ratio)
        insort(self._sorted, ratio)
        self._choose()

    def was_late(self, is_late: bool, has_finetuning: bool = True) -> None:
        """Whether an iteration with output tokens took longer than its target, and held finetuning
        work, which may have been the reason."""
        self._late_anyway += GAIN * ((is_late and not has_finetuning) - self._late_anyway)
        least = LEAST_LATE_SHARE * self._late_share
        may_be_late = max(self._late_share - self._late_anyway, least)
        moved = self.beyond + GAIN * (may_be_late - (is_late and has_finetuning))
        self.beyond = min(max(moved, LEAST_BEYOND), MOST_BEYOND)
        self._choose()

    def _choose(self) -> None:
        count = len(self._sorted)
        if count >= MIN_RESIDUALS:
            at = min(int((1.0 - self.beyond) * count), count - 1)
            self.value = min(self._most, max(1.0, self._sorted[at]))
