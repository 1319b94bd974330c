"""A curve in one line of text."""

import itertools
import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_ASCII = "_.,-=*#@"


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The values from the first to the last, between their least and their greatest.

    More than ``width`` values are averaged in equal groups; NaN and what is beyond 1e30 is left
    out, it would hide the rest.
    """
    values = [value for value in values if abs(value) < 1e30]
    if not values:
        return ""
    count = min(len(values), width)
    bounds = [index * len(values) // count for index in range(count + 1)]
    means = [
        math.fsum(values[start:end]) / (end - start) for start, end in itertools.pairwise(bounds)
    ]
    low, high = min(means), max(means)
    marks = _ASCII if ascii_only else _BARS
    top = len(marks) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(marks[round((mean - low) * scale)] for mean in means)
