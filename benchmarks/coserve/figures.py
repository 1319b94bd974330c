"""What a load client recorded, as figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.coserve.client import LoadRecord, RequestRecord

# The latency target of a load is so many times stock's median time per output token at it.
TARGET_MULTIPLE = 2.5
# A request that reaches over an end of the window has a TPOT if so many of its tokens lie in it.
LEAST_TOKENS = 16
CDF_SHARES = (0, 1, 5, *range(10, 91, 5), 92, 94, 95, 96, 97, 98, 99, 99.5, 99.9, 100)


@dataclass(frozen=True)
class Latencies:
    """Of the measuring window; milliseconds, and None where nothing was observed.

    Attributes:
        ttft_p50_ms, ttft_p99_ms: time to first token of the requests sent within the window. One
            that has none when the client stops waiting counts with its wait until then.
        tpot_p50_ms, tpot_p99_ms: mean time per output token of each request, over its tokens that
            came within the window.
        itl_p50_ms, itl_p99_ms: gaps between tokens of a request that end within the window.
        itl_cdf_ms: quantiles of the gaps at :data:`CDF_SHARES` per cent.
        within_target: share of these gaps that are no longer than the target; a gap that is open
            at the end of the window, and longer by then, counts as one that is not.
        output_tokens_per_s: tokens that came within the window.
        num_sent, num_done, num_failed: requests sent, completed, failed within the window.
        first_error: of the failed ones.
    """

    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    itl_cdf_ms: list[float]
    within_target: float | None
    output_tokens_per_s: float
    num_sent: int
    num_done: int
    num_failed: int
    first_error: str | None


def latencies(record: LoadRecord, target_ms: float | None) -> Latencies:
    """Figures of a record.

    Args:
        record: of the client.
        target_ms: of the time per output token; None where there is none.
    """
    begin, end = record.begin, record.end
    sent = [r for r in record.requests if begin <= r.sent < end]
    failed = [r for r in record.requests if r.error is not None]
    ttft = [1e3 * ((r.tokens[0] if r.tokens else record.stopped) - r.sent) for r in sent]
    tpot = tpots_ms(record)
    gaps = _gaps_ms(record)
    return Latencies(
        ttft_p50_ms=_percentile(ttft, 50),
        ttft_p99_ms=_percentile(ttft, 99),
        tpot_p50_ms=_percentile(tpot, 50),
        tpot_p99_ms=_percentile(tpot, 99),
        itl_p50_ms=_percentile(gaps, 50),
        itl_p99_ms=_percentile(gaps, 99),
        itl_cdf_ms=[float(x) for x in np.percentile(gaps, CDF_SHARES)] if gaps else [],
        within_target=None if target_ms is None else _within(record, gaps, target_ms),
        output_tokens_per_s=sum(begin <= t < end for r in record.requests for t in r.tokens)
        / (end - begin),
        num_sent=len(sent),
        num_done=sum(r.ended is not None and begin <= r.ended < end for r in record.requests),
        num_failed=len(failed),
        first_error=failed[0].error if failed else None,
    )


def tpots_ms(record: LoadRecord) -> list[float]:
    """Mean time per output token of each request that has one."""
    each = (_tpot_ms(request, record.begin, record.end) for request in record.requests)
    return [tpot for tpot in each if tpot is not None]


def _tpot_ms(request: RequestRecord, begin: float, end: float) -> float | None:
    inside = [t for t in request.tokens if begin <= t < end]
    whole = request.sent >= begin and request.ended is not None and request.ended < end
    if len(inside) < (2 if whole else LEAST_TOKENS):
        return None
    return 1e3 * (inside[-1] - inside[0]) / (len(inside) - 1)


def _gaps_ms(record: LoadRecord) -> list[float]:
    return [
        1e3 * (later - earlier)
        for request in record.requests
        for earlier, later in zip(request.tokens, request.tokens[1:], strict=False)
        if record.begin <= later < record.end
    ]


def _within(record: LoadRecord, gaps: Sequence[float], target_ms: float) -> float | None:
    late = 0
    for request in record.requests:
        before = [t for t in request.tokens if t < record.end]
        open_ = request.ended is None or request.ended >= record.end
        if before and open_ and request.error is None:
            late += 1e3 * (record.end - before[-1]) > target_ms
    if not gaps and not late:
        return None
    return sum(gap <= target_ms for gap in gaps) / (len(gaps) + late)


def _percentile(values: Sequence[float], share: float) -> float | None:
    return float(np.percentile(values, share)) if values else None


def trained_by_steps(marks: Sequence[tuple[float, int]], begin: float, end: float) -> float:
    """Tokens trained between two readings of a clock, the step in progress counted in part.

    Args:
        marks: reading at the end of each step, ascending, and the tokens of the step. The last
            one must not lie before ``end``.
        begin, end: readings of the same clock.
    """
    clock = [reading for reading, _ in marks]
    trained = np.cumsum([tokens for _, tokens in marks])
    first, last = np.interp([begin, end], clock, trained)
    return float(last - first)


def trained_in_iterations(
    iterations: Sequence[dict[str, Any]], num_layers: int, begin: float, end: float
) -> tuple[float, float]:
    """Forward and backward tokens of the iterations between two times.

    Iterations that reach over an end count in part.

    Args:
        iterations: records of ``GET /v1/finetuning/iterations``.
        num_layers: decoder layers, by which token-layers of the backward are divided.
        begin, end: seconds since the epoch.
    """
    forward = backward = 0.0
    for iteration in iterations:
        start, seconds = iteration["start_time"], iteration["duration_ms"] / 1e3
        inside = min(end, start + seconds) - max(begin, start)
        if inside > 0:
            share = inside / seconds
            forward += share * iteration["finetuning_forward_tokens"]
            backward += share * iteration["finetuning_backward_tokens"] / num_layers
    return forward, backward
