"""What the latency model of our server allows finetuning at most, and where the time goes."""

from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from flexllm_vllm.scheduler.budget import Budget

PREFIX = "vllm:finetuning_"
# Terms of the model that are there without finetuning.
INFERENCE = ("constant", "has_rows", "decode_rows", "decode_context", "prefill_tokens")


@dataclass(frozen=True)
class Mixed:
    """Iterations of our server with inference and finetuning; means, in milliseconds.

    Attributes:
        count: of these iterations.
        measured_ms, target_ms: how long they took, and might have taken.
        parts_ms: by the terms of the latency model.
        costs_ms: of one unit of each term, at the end.
        knee: rows of a forward beyond which each costs more.
        margin: factor on the predictions, at the end.
        backward_cost: of a trained token, in tokens through the decoder layers: the loss head
            comes on top of those.
    """

    count: int
    measured_ms: float
    target_ms: float
    parts_ms: dict[str, float]
    costs_ms: dict[str, float]
    knee: float
    margin: float
    backward_cost: float


def read_metrics(text: str) -> dict[str, dict[str, float]]:
    """Our series of a scrape, by name: of iterations the mixed ones, of the model by term."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            ours = sample.name.startswith(PREFIX) and "le" not in labels
            if ours and labels.get("kind", "mixed") == "mixed":
                name = sample.name.removeprefix(PREFIX)
                found.setdefault(name, {})[labels.get("term", "")] = sample.value
    return found


def mixed_between(
    before: dict[str, dict[str, float]], after: dict[str, Any], through_layers: float
) -> Mixed | None:
    """The mixed iterations between two scrapes; None if there were none.

    Args:
        before, after: see :func:`read_metrics`.
        through_layers: tokens that went backward through the decoder layers meanwhile.
    """

    def grown(name: str, term: str = "") -> float:
        return float(after[name][term] - before.get(name, {}).get(term, 0.0))

    count = int(grown("iterations_total"))
    if not count:
        return None
    parts = "mixed_iteration_part_seconds_total"
    return Mixed(
        count,
        1e3 * grown("iteration_time_seconds_sum") / count,
        1e3 * grown("iteration_target_seconds_sum") / count,
        {term: 1e3 * grown(parts, term) / count for term in after[parts]},
        {term: 1e3 * s for term, s in after["latency_model_cost_seconds"].items()},
        after["latency_model_knee_rows"][""],
        after["latency_model_margin"][""],
        grown("backward_tokens_total") / through_layers if through_layers else 1.0,
    )


def ceiling(mixed: dict[str, Any], noise: float, max_tokens: int) -> float:
    """Finetuning tokens/s of iterations that take the whole target, with nothing left over.

    Args:
        mixed: a :class:`Mixed` as a dict.
        noise: longest iteration over the usual one; what is to end in time must be planned to take
            so much less.
        max_tokens: of a forward.
    """
    parts, costs = mixed["parts_ms"], mixed["costs_ms"]
    whole = mixed["target_ms"] / noise
    limit = whole - sum(parts[term] for term in INFERENCE)
    rows = parts["decode_rows"] / costs["decode_rows"] if costs["decode_rows"] else 1.0
    backward = mixed["backward_cost"] * costs["backward_tokens"]
    budget = Budget(
        limit, costs["forward_tokens"], backward, max_tokens,
        rows=costs["has_finetuning_rows"], window=costs["backward_windows"],
        room=max(0.0, mixed["knee"] - rows), beyond=costs["rows_beyond_knee"],
    )  # fmt: skip
    return 1e3 * max(0.0, budget.tokens(limit)) / whole
