"""What co-serving must show against its peers, and whether the figures do."""

from dataclasses import dataclass
from typing import Any

from benchmarks.coserve.ceiling import ceiling
from benchmarks.coserve.loads import is_busy
from flexllm_vllm.config import FinetuningConfig

LEAST_WITHIN_TARGET = 0.99
LEAST_SHARE_OF_ALONE = 0.80
LEAST_SHARE_OF_CEILING = 0.90
FEW_STREAMS = ("busy-1", "busy-2")

Cells = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Claim:
    """One load.

    Attributes:
        says: what is claimed.
        load: where.
        figures: what was measured.
        met: whether it holds; None if a figure that it needs is missing.
    """

    says: str
    load: str
    figures: str
    met: bool | None


@dataclass(frozen=True)
class Ceilings:
    """Finetuning at a load, as shares of alone.

    Attributes:
        noise: 99th percentile of stock's gaps over their median, with one stream.
        free: what the latency model allows at most.
        with_noise: of iterations planned so much shorter that noise leaves 99 of 100 in time.
        reached: what was measured.
    """

    noise: float
    free: float
    with_noise: float
    reached: float

    @property
    def share(self) -> float | None:
        """Reached, of the ceiling with noise; None where noise leaves nothing."""
        return self.reached / self.with_noise if self.with_noise > 0 else None


def ceilings(cells: Cells, load: str) -> Ceilings | None:
    """None where something was not measured."""
    ours, stock, whole = cells.get(f"{load}/coserve"), cells.get(f"{load}/stock"), alone(cells)
    mixed = ours and ours["training"].get("mixed")
    if not (ours and mixed and stock and whole and stock["latency"]["itl_p50_ms"]):
        return None
    # With one stream no other's prompt comes between two tokens: what is left is the machine's.
    # Of two runs the quieter one: a hiccup of the other would make the ceiling too low.
    alike = [cells[k] for k in ("busy-1/stock", "busy-1/stock again") if k in cells] or [stock]
    noise = min(c["latency"]["itl_p99_ms"] / c["latency"]["itl_p50_ms"] for c in alike)
    most = FinetuningConfig.max_tokens
    free, with_noise = (ceiling(mixed, factor, most) / whole for factor in (1.0, noise))
    return Ceilings(noise, free, with_noise, trained(ours) / whole)


def within_ceiling(cells: Cells, load: str) -> float | None:
    """Share of the output tokens that can be within the target beside finetuning.

    Others' prompts take longer than the target with no finetuning at all: those tokens are late
    for stock too. Where arrivals do not wait for answers, requests that take so many times as long
    are so many times as many at once, and each prompt makes as many more tokens late.
    """
    ours, stock = (cells.get(f"{load}/{name}") for name in ("coserve", "stock"))
    if not (ours and stock) or stock["latency"]["within_target"] is None:
        return None
    at_once = 1.0
    if not is_busy(load):
        mine, other = (c["latency"]["tpot_p50_ms"] for c in (ours, stock))
        at_once = max(1.0, mine / other)
    return float(1.0 - at_once * (1.0 - stock["latency"]["within_target"]))


def alone(cells: Cells) -> float | None:
    """Tokens/s of our server without requests: the mean of the begin and the end of the run."""
    found = [cells[k] for k in ("idle/alone", "idle/alone again") if k in cells]
    return sum(trained(c) for c in found) / len(found) if found else None


def peft_alone(cells: Cells) -> float | None:
    return trained(cells["idle/peft"]) if "idle/peft" in cells else None


def trained(cell: dict[str, Any]) -> float:
    """Finetuning tokens/s of a cell."""
    return float(cell["training"]["tokens_per_s"]) if cell["training"] else 0.0


def check(cells: Cells, loads: list[str]) -> list[Claim]:
    """The claims, for each load that our server was measured at."""
    claims = []
    for load in loads:
        ours, spatial, temporal = (
            cells.get(f"{load}/{name}") for name in ("coserve", "spatial", "temporal")
        )
        if ours is None:
            continue
        within, p99 = (ours["latency"][k] for k in ("within_target", "tpot_p99_ms"))
        says = f"output tokens within 2.5 x stock's TPOT >= {LEAST_WITHIN_TARGET:.0%}"
        shown = "-" if within is None else f"{within:.2%}"
        met = None if within is None else within >= LEAST_WITHIN_TARGET
        claims.append(Claim(says, load, shown, met))
        whole = alone(cells)
        if whole and load in FEW_STREAMS:
            share = trained(ours) / whole
            says = f"finetuning >= {LEAST_SHARE_OF_ALONE:.0%} of alone"
            claims.append(Claim(says, load, f"{share:.1%}", share >= LEAST_SHARE_OF_ALONE))
            if share < LEAST_SHARE_OF_ALONE and (found := ceilings(cells, load)):
                part = found.share
                says = f"or >= {LEAST_SHARE_OF_CEILING:.0%} of the ceiling with noise"
                figures = "-" if part is None else f"{part:.1%}"
                met = None if part is None else part >= LEAST_SHARE_OF_CEILING
                claims.append(Claim(says, load, figures, met))
        if temporal is not None:
            mine, other = trained(ours), trained(temporal)
            figures = f"{mine:.0f} against {other:.0f} tokens/s"
            claims.append(Claim("more finetuning than temporal", load, figures, mine > other))
        if spatial is not None:
            other = spatial["latency"]["tpot_p99_ms"]
            met = None if p99 is None or other is None else p99 < other
            figures = f"{_ms(p99)} against {_ms(other)} ms"
            claims.append(Claim("lower p99 TPOT than spatial", load, figures, met))
    return sorted(claims, key=lambda claim: claim.says)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
