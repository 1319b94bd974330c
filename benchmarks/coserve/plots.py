"""Results as plots."""

from pathlib import Path
from typing import Any

from benchmarks.coserve.claims import Cells, alone, trained
from benchmarks.coserve.figures import CDF_SHARES
from benchmarks.coserve.report import loads_of, sweep_cells
from benchmarks.coserve.systems import SERVING

COLORS = {"stock": "0.55", "spatial": "tab:orange", "temporal": "tab:green", "coserve": "tab:blue"}


def write(results: dict[str, Any], out: Path) -> None:
    """Writes ``loads.png``, ``gaps.png`` and ``sweep.png``, as far as there are cells."""
    import matplotlib

    matplotlib.use("Agg")
    cells: Cells = results["cells"]
    if loads_of(cells):
        _loads(cells, out / "loads.png")
        _gaps(cells, out / "gaps.png")
    if sweep_cells(cells):
        _sweep(cells, out / "sweep.png")


def _loads(cells: Cells, path: Path) -> None:
    """Latency and finetuning of every system, load by load."""
    from matplotlib import pyplot as plt

    loads = loads_of(cells)
    panels = {
        "TPOT p99, ms": lambda c: c["latency"]["tpot_p99_ms"],
        "TTFT p99, ms": lambda c: c["latency"]["ttft_p99_ms"],
        "finetuning tokens/s": trained,
    }
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 8), layout="constrained", sharex=True)
    for axis, (label, value) in zip(axes, panels.items(), strict=True):
        for shift, name in enumerate(SERVING):
            found = [(i, cells.get(f"{load}/{name}")) for i, load in enumerate(loads)]
            bars = [(i, value(c)) for i, c in found if c and value(c) is not None]
            places = [i + 0.2 * (shift - 1.5) for i, _ in bars]
            axis.bar(places, [b for _, b in bars], 0.19, color=COLORS[name], label=name)
        axis.set(ylabel=label)
        if "ms" in label:
            _log(axis, "y")
            axis.set_ylim(bottom=0.5 * axis.dataLim.minposy)
    for i, load in enumerate(loads):
        target = next((c["target_ms"] for c in cells.values() if c["load"] == load), None)
        if target:
            axes[0].plot((i - 0.45, i + 0.45), (target, target), "k--", linewidth=1)
    if whole := alone(cells):
        axes[2].axhline(whole, color="k", linestyle="--", linewidth=1)
    axes[0].set_title("dashed: target (2.5 x stock's median); below: ours without requests")
    axes[0].legend(ncols=len(SERVING), fontsize="small", loc="upper left")
    axes[0].set_ylim(top=3 * axes[0].get_ylim()[1])
    axes[2].set_xticks(range(len(loads)), loads)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _gaps(cells: Cells, path: Path) -> None:
    """Share of the gaps between tokens below a time."""
    from matplotlib import pyplot as plt

    loads = loads_of(cells)
    columns = min(4, len(loads))
    rows = -(-len(loads) // columns)
    size = (3 * columns + 1, 2.8 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(loads) :]:
        axis.set_visible(False)
    for axis, load in zip(axes.flat, loads, strict=False):
        for name in SERVING:
            cell = cells.get(f"{load}/{name}")
            if cell and cell["latency"]["itl_cdf_ms"]:
                axis.plot(cell["latency"]["itl_cdf_ms"], CDF_SHARES, color=COLORS[name], label=name)
                if name == "stock":
                    axis.axvline(cell["target_ms"], color="k", linestyle="--", linewidth=1)
        axis.set(title=load, xlabel="gap, ms", ylabel="% of gaps", ylim=(0, 101))
        _log(axis, "x")
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _sweep(cells: Cells, path: Path) -> None:
    """What a laxer target buys."""
    from matplotlib import pyplot as plt

    swept = [(m, c) for m, c in sweep_cells(cells) if c["latency"]["tpot_p50_ms"] is not None]
    if not swept:
        return
    load, whole = swept[0][1]["load"], alone(cells)
    unit = 100 / whole if whole else 1.0
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for share, style in ((50, "o-"), (99, "s--")):
        points = [(c["latency"][f"tpot_p{share}_ms"], unit * trained(c)) for _, c in swept]
        axis.plot(*zip(*points, strict=True), style, color=COLORS["coserve"],
                  label=f"ours, TPOT p{share}")  # fmt: skip
        for name in SERVING[:-1]:
            cell = cells.get(f"{load}/{name}")
            if cell and cell["latency"][f"tpot_p{share}_ms"] is not None:
                axis.plot(cell["latency"][f"tpot_p{share}_ms"], unit * trained(cell), style[0],
                          color=COLORS[name], label=f"{name}, p{share}")  # fmt: skip
    for multiple, cell in swept:
        place = (cell["latency"]["tpot_p50_ms"], unit * trained(cell))
        axis.annotate(f"x{multiple:g}", place, (3, 5), textcoords="offset points", fontsize=8)
    label = "finetuning, % of alone" if whole else "finetuning tokens/s"
    axis.set(xlabel=f"TPOT at {load}, ms", ylabel=label, ylim=(-3, None))
    _log(axis, "x")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _log(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
