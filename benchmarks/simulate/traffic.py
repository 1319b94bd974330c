"""Requests: a day's course of the rate with bursts, ShareGPT-like lengths."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

# Tokens: log-normal (median, sigma), least, most.
PROMPT = (160.0, 1.1, 4, 2000)
OUTPUT = (180.0, 0.8, 4, 1000)
# Coefficient of variation of the times between arrivals: Poisson has 1.
VARIATION = 2.0
# Mean seconds between bursts, their length, and the factor of the rate.
BURST = (600.0, 15.0, 3.0)


@dataclass(frozen=True)
class Arrival:
    """A request.

    Attributes:
        time: seconds after the begin.
        prompt_tokens: of its prompt.
        output_tokens: of its answer.
    """

    time: float
    prompt_tokens: int
    output_tokens: int


def arrivals(seconds: float, peak: float, seed: int) -> Iterator[Arrival]:
    """Requests within so many seconds, which are the course of one day: night at both ends.

    Args:
        seconds: of the day.
        peak: requests a second at noon, between bursts.
        seed: of times and lengths.
    """
    rng = random.Random(f"traffic {seed}")
    shape = 1 / VARIATION**2
    now, burst_from = 0.0, rng.expovariate(1 / BURST[0])
    wait = rng.gammavariate(shape, 1 / shape)
    while now < seconds:
        # Time runs as fast as the rate: a step of a second at most, in which it hardly changes.
        rate = peak * max(0.0, 1.1 * math.sin(math.pi * now / seconds) ** 2 - 0.1)
        if now > burst_from + BURST[1]:
            burst_from = now + rng.expovariate(1 / BURST[0])
        if now >= burst_from:
            rate *= BURST[2]
        if wait > rate:
            wait -= rate
            now += 1.0
            continue
        now += wait / rate
        wait = rng.gammavariate(shape, 1 / shape)
        yield Arrival(now, _length(rng, *PROMPT), _length(rng, *OUTPUT))


def _length(rng: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return min(most, max(least, round(rng.lognormvariate(math.log(median), sigma))))
