"""Results as Markdown tables."""

from pathlib import Path
from typing import Any

from benchmarks.coserve.ceiling import INFERENCE
from benchmarks.coserve.claims import (
    Cells,
    alone,
    ceilings,
    check,
    peft_alone,
    trained,
    within_ceiling,
)
from benchmarks.coserve.loads import LOADS
from benchmarks.coserve.systems import SERVING

NAMES = {
    "stock": "stock vLLM, no finetuning",
    "spatial": "stock vLLM and HF PEFT on the same cores at once",
    "temporal": "stock vLLM; HF PEFT is stopped while a request is in flight",
    "coserve": "ours, with a running job",
    "peft": "HF PEFT, no inference",
    "alone": "ours, a running job and no requests",
}
HEADER = (
    "system", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms", "gap p50 / p99, ms", "within target",
    "output tokens/s", "requests done", "finetuning tokens/s", "of alone", "of PEFT alone",
)  # fmt: skip


def write(results: dict[str, Any], out: Path) -> None:
    """Writes ``report.md``; the sections that the cells allow."""
    (out / "report.md").write_text("\n".join(_lines(results)) + "\n")


def loads_of(cells: Cells) -> list[str]:
    """Loads that were measured, in order."""
    return [load for load in LOADS if any(f"{load}/{name}" in cells for name in SERVING)]


def _lines(results: dict[str, Any]) -> list[str]:
    cells: Cells = results["cells"]
    loads = loads_of(cells)
    lines = ["# Inference and finetuning side by side", "", *_conditions(results), ""]
    lines += ["| system | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in NAMES.items())]
    lines += ["", "## What it must show", "", *_claims(cells, loads)]
    lines += ["", "## Finetuning alone", "", *_alone(cells)]
    for load in loads:
        target = next((c["target_ms"] for c in cells.values() if c["load"] == load), None)
        shown = f", target {target:.0f} ms" if target else ""
        lines += ["", f"## {load}{shown}", "", *_table(cells, load)]
    if rows := _time(cells, loads):
        lines += ["", "## Where the time goes, and the ceiling", "", *rows]
    lines += ["", "## Noise", "", *_noise(cells), *_set_aside(results)]
    if sweep := _sweep(cells):
        lines += ["", "## The target", "", *sweep, "", "![sweep](sweep.png)"]
    if loads:
        lines += ["", "## Plots", "", "![loads](loads.png)", "", "![gaps](gaps.png)"]
    return lines


def _conditions(results: dict[str, Any]) -> list[str]:
    s, conditions = results["settings"], results["conditions"]
    machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    environment = ", ".join(f"{k}={v}" for k, v in conditions["environment"].items())
    data = s["data"] or "synthetic examples of 512 tokens that all carry loss"
    aim = "2.5 times stock's median TPOT" if s["explicit_target"] else "auto, its own estimate"
    return [
        f"{machine}. {s['model']}, float32; LoRA r=16, alpha=32 on all linears; {data}; 4 sequences"
        f" an optimizer step. {s['seconds']:.0f} s a cell after {s['warm_up']:.0f} s of the load, "
        f"one run of {results['minutes']:.0f} minutes, seed {s['seed']}.",
        "",
        f"Both servers: compiled, `{conditions['flags']}`; {environment}. Our server's target: "
        f"{aim}{'; ' + ' '.join(s['ours_flags']) if s['ours_flags'] else ''}. PEFT: eager with "
        "SDPA, gradients accumulated one sequence at a time (nothing padded). "
        "What is not measured is stopped. " + "; ".join(x.capitalize() for x in results["starts"]),
        "",
        "*busy-N*: N streams, always one request each, 48 to 80 tokens in, 96 to 160 out. "
        "*poisson-1, -2, -3*: such requests at 20, 45 and 70% of stock's best output tokens/s here."
        " *bursty*: gamma arrivals (CV 3), ShareGPT-like lengths, 35%. TPOT: mean of a request over"
        " its tokens in the window; *gap*: between two tokens; *within target*: share of the gaps "
        "that are no longer than 2.5 times stock's median TPOT at the load.",
    ]  # fmt: skip


def _claims(cells: Cells, loads: list[str]) -> list[str]:
    verdicts = {True: "met", False: "**NOT met**", None: "**not measured**"}
    rows = [
        f"| {c.says} | {c.load} | {c.figures} | {verdicts[c.met]} |" for c in check(cells, loads)
    ]
    return ["| | load | measured | |", "| --- | --- | --- | --- |", *rows]


def _alone(cells: Cells) -> list[str]:
    lines = ["| | tokens/s | forward / backward | by optimizer steps |", "| --- " * 4 + "|"]
    for key in ("idle/peft", "idle/alone", "idle/alone again"):
        if cell := cells.get(key):
            t = cell["training"]
            parts = _pair(t["forward_per_s"], t["backward_per_s"])
            steps = "-" if t["steps_per_s"] is None else f"{t['steps_per_s']:.0f}"
            lines.append(
                f"| {key.removeprefix('idle/')} | {trained(cell):.1f} | {parts} | {steps} |"
            )
    return lines


def _table(cells: Cells, load: str) -> list[str]:
    lines = ["| " + " | ".join(HEADER) + " |", "| --- " * len(HEADER) + "|"]
    for name in SERVING:
        if cell := cells.get(f"{load}/{name}"):
            lines.append(_row(name, cell, alone(cells), peft_alone(cells)))
    return lines


def _row(name: str, cell: dict[str, Any], ours: float | None, peft: float | None) -> str:
    x = cell["latency"]
    failed = f" ({x['num_failed']} failed)" if x["num_failed"] else ""
    speed = trained(cell)
    values = [name, *(_pair(x[f"{k}_p50_ms"], x[f"{k}_p99_ms"]) for k in ("ttft", "tpot", "itl"))]
    values += [_share(x["within_target"], 2), f"{x['output_tokens_per_s']:.1f}"]
    values += [f"{x['num_done']}{failed}"]
    if cell["training"]:
        values += [f"{speed:.1f}", *(_share(total and speed / total) for total in (ours, peft))]
    else:
        values += ["-"] * 3
    return "| " + " | ".join(values) + " |"


# What the report calls the terms of the latency model.
PARTS = {
    "inference": INFERENCE,
    "any finetuning rows": ("has_finetuning_rows",),
    "forward": ("forward_tokens", "rows_beyond_knee"),
    "backward": ("backward_tokens",),
    "each window": ("backward_windows",),
    "steps": ("optimizer_steps",),
}


def _time(cells: Cells, loads: list[str]) -> list[str]:
    """Of iterations with both kinds of work; and what the latency model allows at most."""
    lines = [
        "Means of our server's iterations with requests and finetuning, in milliseconds, as its "
        "latency model divides them; *margin* is what it has learnt to keep free.",
        "",
        "| load | target | measured | " + " | ".join(PARTS) + " | margin |",
        "| --- " * (len(PARTS) + 4) + "|",
    ]
    count = len(lines)
    for load in loads:
        cell = cells.get(f"{load}/coserve")
        if cell and (mixed := cell["training"].get("mixed")):
            parts = [sum(mixed["parts_ms"][t] for t in terms) for terms in PARTS.values()]
            values = [mixed["target_ms"], mixed["measured_ms"], *parts]
            shown = " | ".join(f"{value:.0f}" for value in values)
            lines.append(f"| {load} | {shown} | {mixed['margin']:.2f} |")
    if len(lines) == count:
        return []
    lines += [
        "",
        "The ceiling: what these costs, the loss head's among them, allow if every iteration took "
        "its whole target and no time were lost. Iterations vary without any finetuning: of "
        "stock's gaps the 99th percentile is *noise* times the median, so that those that shall "
        "end in time 99 times in 100 must be planned so much shorter; *with noise* is the ceiling "
        "of these. It bounds what runs to its end whatever the time, the forward; the backward is "
        "ended at the iteration's deadline and needs no such room, so that more can be reached.",
        "",
        "| load | noise | ceiling, of alone | with noise | reached, of alone | of the ceiling | "
        "of that with noise |",
        "| --- " * 7 + "|",
    ]
    for load in loads:
        if found := ceilings(cells, load):
            part = "-" if found.share is None else f"{found.share:.1%}"
            whole = f"{found.reached / found.free:.1%}" if found.free else "-"
            lines.append(
                f"| {load} | {found.noise:.2f} | {found.free:.1%} | {found.with_noise:.1%} | "
                f"{found.reached:.1%} | {whole} | {part} |"
            )
    lines += [
        "",
        "What can be within the target: others' prompts make tokens late without finetuning too, "
        "stock's are what is missing there. Where arrivals do not wait for answers (*poisson*, "
        "*bursty*), requests that take so many times as long are as many times as many at once, "
        "and each prompt makes as many more tokens late: the ceiling takes that off.",
        "",
        "| load | stock within target | ceiling | reached |",
        "| --- " * 4 + "|",
    ]
    for load in loads:
        if most := within_ceiling(cells, load):
            shares = [
                cells[f"{load}/{x}"]["latency"]["within_target"] for x in ("stock", "coserve")
            ]
            shown = " | ".join(_share(x, 2) for x in (shares[0], most, shares[1]))
            lines.append(f"| {load} | {shown} |")
    return lines


def _noise(cells: Cells) -> list[str]:
    lines = []
    again = next((key for key in cells if key.endswith("/stock again")), None)
    if again and (first := cells.get(again.removesuffix(" again"))):
        for what, field in (("median TPOT", "tpot_p50_ms"), ("output tokens/s", None)):
            a, b = (c["latency"][field or "output_tokens_per_s"] for c in (first, cells[again]))
            if a and b:
                lines.append(f"Stock at {first['load']}, {what} at the begin and the end: "
                             f"{a:.1f} and {b:.1f} ({b / a - 1:+.1%}).")  # fmt: skip
    if {"idle/alone", "idle/alone again"} <= cells.keys():
        a, b = (trained(cells[k]) for k in ("idle/alone", "idle/alone again"))
        lines.append(f"Ours alone, tokens/s: {a:.1f} and {b:.1f} ({b / a - 1:+.1%}).")
    client = max((c["client_cpu"] for c in cells.values()), default=0.0)
    lines.append(f"The load client used at most {client:.1%} of a core.")
    return [x for line in lines for x in (line, "")][:-1]


def _set_aside(results: dict[str, Any]) -> list[str]:
    """Cells that were measured again (by hand, with ``--resume``), and why."""
    lines = []
    for key, (reason, cell) in results.get("set_aside", {}).items():
        within = _share(cell["latency"]["within_target"], 2)
        figures = f"{trained(cell):.1f} tokens/s and {within} within the target"
        lines += ["", f"{key} was measured again. The first, {figures}, was set aside: {reason}."]
    return lines


def sweep_cells(cells: Cells) -> list[tuple[float, dict[str, Any]]]:
    """Multiples of stock's TPOT and their cells, ascending."""
    found = [
        (float(key.rsplit("coserve x", 1)[1]), cell)
        for key, cell in cells.items()
        if "coserve x" in key
    ]
    return sorted(found, key=lambda pair: pair[0])


def _sweep(cells: Cells) -> list[str]:
    swept = sweep_cells(cells)
    if not swept:
        return []
    load = swept[0][1]["load"]
    lines = [
        f"Our server at {load} with `--finetuning-tpot-slo-ms`, {swept[0][1]['seconds']:.0f} s "
        "each; *within target* is of that target. Peers from above.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "| --- " * len(HEADER) + "|",
    ]
    shown = {f"x{multiple:g}, {c['server_slo_ms']:.0f} ms": c for multiple, c in swept}
    shown |= {name: c for name in SERVING if (c := cells.get(f"{load}/{name}"))}
    return lines + [_row(k, c, alone(cells), peft_alone(cells)) for k, c in shown.items()]


def _pair(p50: float | None, p99: float | None) -> str:
    return "-" if p50 is None or p99 is None else f"{p50:.0f} / {p99:.0f}"


def _share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}%}"
