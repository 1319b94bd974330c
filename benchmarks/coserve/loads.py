"""The loads: how many requests, how long, and when."""

import random
from dataclasses import dataclass

BUSY = ("busy-1", "busy-2", "busy-4", "busy-8")
# Share of the output tokens/s that stock vLLM showed at its best busy load in the same run.
POISSON = {"poisson-1": 0.20, "poisson-2": 0.45, "poisson-3": 0.70}
BURSTY_SHARE = 0.35
BURSTY_CV = 3.0
LOADS = (*BUSY, *POISSON, "bursty")

# Tokens of prompts and answers of all loads but the bursty one: uniform, so that streams that
# begin together do not stay in step.
PROMPT_TOKENS = (48, 80)
OUTPUT_TOKENS = (96, 160)
# The bursty load's, after ShareGPT: log-normal (median, sigma), least.
BURSTY_PROMPT = (80.0, 1.1, 4)
BURSTY_OUTPUT = (160.0, 0.8, 8)
MAX_TOKENS = 900
# Of the time of an open load; above a half, so that a single request has a place.
LONGEST_PAUSE = 0.6
# A stream of a busy load ends no request sooner than this; seconds.
SHORTEST_REQUEST = 0.5


@dataclass(frozen=True)
class Stream:
    """Requests one after the other, each sent when the one before has ended.

    Attributes:
        start: seconds after the begin of the load.
        requests: tokens of the prompt and of the answer, of each.
    """

    start: float
    requests: tuple[tuple[int, int], ...]


def is_busy(load: str) -> bool:
    """Whether a load needs no capacity to be known."""
    return load in BUSY or load == "idle"


def streams(load: str, seconds: float, capacity: float | None, seed: int) -> list[Stream]:
    """What is sent within so many seconds; the same for every system.

    Args:
        load: one of :data:`LOADS`, or ``"idle"``.
        seconds: of the load.
        capacity: output tokens/s of stock vLLM; the open loads are shares of it.
        seed: of lengths and arrivals.
    """
    if load == "idle":
        return []
    rng = random.Random(f"{seed} {load}")
    if load in BUSY:
        count = int(seconds / SHORTEST_REQUEST) + 1
        return [
            Stream(0.0, tuple(_request(rng) for _ in range(count)))
            for _ in range(int(load.removeprefix("busy-")))
        ]
    if capacity is None:
        raise ValueError(f"{load} is a share of what the busy loads reach; measure one of {BUSY}")
    bursty = load == "bursty"
    share = BURSTY_SHARE if bursty else POISSON[load]
    mean_output = _mean_bursty_output() if bursty else sum(OUTPUT_TOKENS) / 2
    count = max(1, round(share * capacity / mean_output * seconds))
    shape = 1 / BURSTY_CV**2 if bursty else 1.0
    draw = _bursty_request if bursty else _request
    return [Stream(at, (draw(rng),)) for at in _arrivals(rng, count, seconds, shape)]


def _arrivals(rng: random.Random, count: int, seconds: float, shape: float) -> list[float]:
    """Times of ``count`` arrivals with gamma-distributed gaps (shape 1: a Poisson process).

    Scaled so that the rate is the one asked for: within a minute, chance would change it more
    than the loads differ. Drawn again if a pause takes most of the time.
    """
    gaps = [1.0]
    while max(gaps) > LONGEST_PAUSE * sum(gaps):
        gaps = [rng.gammavariate(shape, 1.0) for _ in range(count + 1)]
    scale = seconds / sum(gaps)
    times, now = [], 0.0
    for gap in gaps[:-1]:
        now += gap * scale
        times.append(now)
    return times


def _request(rng: random.Random) -> tuple[int, int]:
    return rng.randint(*PROMPT_TOKENS), rng.randint(*OUTPUT_TOKENS)


def _bursty_request(rng: random.Random) -> tuple[int, int]:
    def length(median: float, sigma: float, least: int) -> int:
        return max(least, round(median * rng.lognormvariate(0.0, sigma)))

    prompt = min(length(*BURSTY_PROMPT), MAX_TOKENS - BURSTY_OUTPUT[2])
    return prompt, min(length(*BURSTY_OUTPUT), MAX_TOKENS - prompt)


def _mean_bursty_output() -> float:
    rng = random.Random(0)
    return sum(_bursty_request(rng)[1] for _ in range(4000)) / 4000
