"""What co-serving must show against its peers, and whether the figures do."""

from dataclasses import dataclass
from typing import Any

LEAST_WITHIN_TARGET = 0.99
LEAST_SHARE_OF_ALONE = 0.80
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
