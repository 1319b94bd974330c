"""Runs backward windows until it is time to end the iteration."""

import time
from collections import OrderedDict
from collections.abc import Callable

from flexllm_vllm.plan import BackwardWindow, OptionalWindow, aligned

# Of what is left a window may be expected to take so much; the next one takes the rest, by what is
# left then. A cut costs the fixed part of a window once more.
FIRST_SHARE = 0.7
# A window of the loss head reads as many weights as those of many layers: it is cut once, and the
# iteration ends.
HEAD_SHARE = 0.95
# How far one window moves the pace, between what it stays, and from what cost on it counts in full.
PACE_GAIN = 0.1
LEAST_PACE, MOST_PACE = 0.9, 2.0
TELLING_MS = 20.0
# A window of as many rows as none before has code generated for its GEMMs first (oneDNN, 5 ms for a
# layer's): one that is smaller by up to so many steps is preferred if there was one like it. The
# library keeps the code of about so many sizes.
KNOWN_STEPS = 3
KNOWN_SIZES = 64


class OptionalRunner:
    """Cuts windows to the time that is left.

    Args:
        clock: seconds, that of the plans' deadlines.

    Attributes:
        pace: how much longer than the scheduler expected windows take at the moment, those of the
            loss head (True) and others.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.pace = {False: 1.0, True: 1.0}
        # Rows of the last windows of layers, the oldest first.
        self._sizes: OrderedDict[int, None] = OrderedDict()

    def run(
        self,
        windows: list[OptionalWindow],
        deadline: float,
        run: Callable[[BackwardWindow], bool],
    ) -> tuple[list[BackwardWindow], float]:
        """Runs windows, the last one perhaps in part, its last rows.

        Args:
            windows: in the order in which they run.
            deadline: by the clock.
            run: runs one; False if it was not run.

        Returns:
            Those that were run, and the milliseconds that they took.
        """
        began = now = self._clock()
        done: list[BackwardWindow] = []
        for optional in windows:
            left: OptionalWindow | None = optional
            while left is not None:
                part = self._part(left, 1e3 * (deadline - now))
                if part is None or not run(part.window):
                    return done, 1e3 * (now - began)
                done.append(part.window)
                self._remember(part)
                before, now = now, self._clock()
                self._learn(part, 1e3 * (now - before))
                left = _rest(left, part)
                if left is not None and _is_head(part):
                    return done, 1e3 * (now - began)
        return done, 1e3 * (now - began)

    def _part(self, optional: OptionalWindow, left_ms: float) -> OptionalWindow | None:
        """What of a window is run in so much time; None where that is too little."""
        window, left_ms = optional.window, left_ms / self.pace[_is_head(optional)]
        share = HEAD_SHARE if _is_head(optional) else FIRST_SHARE
        if optional.cost_ms <= share * left_ms:
            return optional
        least_ms = optional.fixed_ms + optional.least * optional.row_ms
        if _is_head(optional) or left_ms * (1.0 - share) >= least_ms:
            left_ms *= share
        elif optional.cost_ms <= left_ms:
            return optional
        rows = int((left_ms - optional.fixed_ms) / max(optional.row_ms, 1e-9))
        if rows < optional.least:
            return None
        if rows >= window.num_token_layers:
            return optional
        rows = self._cut(optional, rows)
        if not rows:
            return None
        costly = rows if _is_head(optional) else None
        return optional._replace(window=window._replace(start=window.end - rows, num_costly=costly))

    def _cut(self, optional: OptionalWindow, rows: int) -> int:
        """So many rows, or a few less where such a window has run before; 0 if none are left."""
        window, step = optional.window, optional.least
        if _is_head(optional):
            return rows - rows % step
        rows = max(0, window.end - aligned(window.end - rows, step))
        # Multiples of the step occur all the time. Others do where a pack ends.
        if rows % step:
            for fewer in range(rows, max(rows - KNOWN_STEPS * step, 0), -step):
                if fewer in self._sizes:
                    return fewer
        return rows

    def _remember(self, part: OptionalWindow) -> None:
        if not _is_head(part):
            rows = part.window.num_token_layers
            self._sizes[rows] = None
            self._sizes.move_to_end(rows)
            if len(self._sizes) > KNOWN_SIZES:
                self._sizes.popitem(last=False)

    def _learn(self, part: OptionalWindow, took_ms: float) -> None:
        kind, gain = _is_head(part), PACE_GAIN * min(1.0, part.cost_ms / TELLING_MS)
        ratio = min(max(took_ms / max(part.cost_ms, 1e-3), LEAST_PACE), MOST_PACE)
        # Rows without loss cost nothing, and say nothing.
        if part.window.num_token_layers:
            self.pace[kind] += gain * (ratio - self.pace[kind])


def _is_head(optional: OptionalWindow) -> bool:
    return optional.window.num_costly is not None


def _rest(optional: OptionalWindow, part: OptionalWindow) -> OptionalWindow | None:
    """What is left of a window after its last rows."""
    window = optional.window
    if part.window.start == window.start:
        return None
    costly = window.num_costly
    if costly is not None and part.window.num_costly is not None:
        costly -= part.window.num_costly
    return optional._replace(window=window._replace(end=part.window.start, num_costly=costly))
