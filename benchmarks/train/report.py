"""Results as a Markdown table and plots."""

from pathlib import Path
from typing import Any

from benchmarks.train.systems import TTFT_SLO_MS

GFLOP_PER_TOKEN = 0.56  # SmolLM2-135M: forward, dX, LoRA; every position with loss


def write(results: dict[str, Any], out: Path) -> None:
    """Writes ``report.md``, ``speed.png`` and ``losses.png``."""
    (out / "report.md").write_text("\n".join(_lines(results)) + "\n")
    _plots(results, out)


def _lines(results: dict[str, Any]) -> list[str]:
    machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    gemm = max(*results["gemm"].values(), *results["gemm_after"].values())
    lines = [
        "# Finetuning alone, against HF PEFT",
        "",
        f"{machine}. float32, r=16 on all linears, batch 1 unless said otherwise. Median tokens/s "
        "of interleaved rounds, range in brackets; forward, backward and optimizer. Ours with "
        f"`--finetuning-ttft-slo-ms {TTFT_SLO_MS:.0f}`: no request waits.",
        f"GEMM 2048^3 in this run: {gemm:.0f} GFLOP/s, which allows {gemm / GFLOP_PER_TOKEN:.0f} "
        f"tokens/s at {GFLOP_PER_TOKEN} GFLOP a token.",
        "",
    ]
    lines += _table("sequence length", results["synthetic"])
    if "real" in results:
        lines += ["", "Real data, padding not counted as tokens:", ""]
        lines += _table("batch", results["real"])
    lines += ["", "Other settings, 512 tokens:", ""]
    variants = dict(results["variants"])
    if results["bfloat16"]:
        variants["bfloat16"] = results["bfloat16"]
    lines += _table("setting", variants)
    short = ", ".join(
        f"{name} {speeds['60']:.0f} ({speeds['60'] / speeds['512']:.0%} of the {speeds['512']:.0f} "
        "with 512 tokens, in turn with them)"
        for name, speeds in results["short"].items()
    )
    lines += ["", f"Examples of 60 tokens, batch 16, tokens/s: {short}.", "", "## Memory", ""]
    lines += _memory(results["memory"])
    lines += ["", "## Where the time goes", "", "Policy store, 512 tokens; `=` sums others.", "",
              "| operation | seconds | GFLOP/s |", "| --- | --- | --- |"]  # fmt: skip
    for row in results["profile"]:
        rate = f"{row['gflop'] / row['seconds']:.0f}" if row["gflop"] else ""
        lines.append(f"| {row['operation']} | {row['seconds']:.2f} | {rate} |")
    return [*lines, "", "![speed](speed.png)", "", "![losses](losses.png)"]


def _table(first: str, cells: dict[str, Any]) -> list[str]:
    names = [n for n in next(iter(cells.values()))["median"] if n != "peft"]
    lines = [
        f"| {first} | " + " | ".join(f"{n} | x PEFT" for n in names)
        + " | PEFT | largest loss difference |",
        "| --- " * (2 * len(names) + 3) + "|",
    ]  # fmt: skip
    for key, cell in cells.items():
        median, speeds = cell["median"], cell["speeds"]
        shown = [
            f"{median[n]:.0f} [{min(speeds[n]):.0f}-{max(speeds[n]):.0f}] | "
            f"**{median[n] / median['peft']:.2f}**"
            for n in names
        ]
        lines.append(
            f"| {key} | {' | '.join(shown)} | {median['peft']:.0f} [{min(speeds['peft']):.0f}-"
            f"{max(speeds['peft']):.0f}] | {cell['largest_loss_difference']:.1e} |"
        )
    return lines


def _memory(memory: dict[str, Any]) -> list[str]:
    peft = memory["peft"]
    lines = [
        "| | kept per token, KB | of PEFT's | peak MiB | of PEFT's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("peft", "peft_checkpointing"):
        cell = memory[name]
        lines.append(
            f"| {name}: its process | {cell['saved_bytes_per_token'] / 1e3:.0f} | "
            f"{cell['saved_bytes_per_token'] / peft['saved_bytes_per_token']:.1%} | "
            f"{cell['peak_mib']:.0f} | {cell['peak_mib'] / peft['peak_mib']:.0%} |"
        )
    for name, cell in memory.items():
        if "/" in name:
            lines.append(
                f"| {name}: added by the job | {cell['saved_bytes_per_token'] / 1e3:.0f} | "
                f"{cell['saved_bytes_per_token'] / peft['saved_bytes_per_token']:.1%} | "
                f"{cell['added_mib']:.0f} (server without: {cell['peak_without_mib']:.0f}) | "
                f"{cell['added_mib'] / peft['peak_mib']:.0%} |"
            )
    long = memory["long"]
    return [
        *lines,
        "",
        f"A sequence of {long['tokens']} tokens, default cache: one step in {long['seconds']:.0f} "
        f"s, loss {long['loss']:.2f}, server peak {long['peak_mib']:.0f} MiB.",
    ]


def _plots(results: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    cells = results["synthetic"]
    for name in next(iter(cells.values()))["median"]:
        axes.plot(list(cells), [c["median"][name] for c in cells.values()], "o-", label=name)
    axes.set(xlabel="sequence length", ylabel="tokens/s", ylim=(0, None))
    axes.legend()
    figure.savefig(out / "speed.png", dpi=120)
    cell = results.get("real", {}).get("4") or cells[next(iter(cells))]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, losses in cell["losses"].items():
        style = "k--" if name == "peft" else "-"
        axes.plot(range(1, len(losses) + 1), losses, style, label=name, alpha=0.8)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend()
    figure.savefig(out / "losses.png", dpi=120)
