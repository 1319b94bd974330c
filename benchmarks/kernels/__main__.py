"""``make bench-gpu``: the operations of the backward against torch's, one by one.

On a GPU the Triton kernels, else the C++ ones for CPUs. Both sides of a pair run in turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.operations import LARGE, SMALL, Sizes, operations
from benchmarks.machine import describe

# Calls are repeated until they last as long as this, so that a clock can tell.
LEAST_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    device = torch.device("cuda" if on_gpu else "cpu")
    sizes = LARGE if on_gpu else SMALL
    results = {
        "machine": {**describe(), **({"gpu": torch.cuda.get_device_name()} if on_gpu else {})},
        "sizes": sizes.name,
        "dtype": dtype,
        "milliseconds": run(sizes, getattr(torch, dtype), device, args.rounds),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "report.md").write_text("\n".join(_lines(results, sizes)) + "\n")
    print((args.out / "report.md").read_text())


def run(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each round, by operation and side."""
    found = {}
    for operation in operations(sizes, dtype, device):
        sides = {"ours": operation.ours, "torch": operation.torchs}
        repeats = {name: _repeats(call, device) for name, call in sides.items()}
        timed: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, call in sides.items():
                seconds = _seconds(call, repeats[name], device)
                timed[name].append(1e3 * seconds / repeats[name])
        found[operation.name] = timed
    return found


def _repeats(call: Callable[[], object], device: torch.device) -> int:
    """Calls that make up a round; the first one compiles."""
    call()
    repeats = 1
    while _seconds(call, repeats, device) < LEAST_SECONDS:
        repeats *= 2
    return repeats


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _lines(results: dict[str, Any], sizes: Sizes) -> list[str]:
    machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    lines = [
        "# Operations of the backward",
        "",
        f"{machine}. Sizes of {sizes.name}, {sizes.tokens} tokens, {results['dtype']}. "
        "Milliseconds: median of interleaved rounds, range in brackets.",
        "",
        "| operation | ours | torch | torch / ours |",
        "| --- | --- | --- | --- |",
    ]
    for name, timed in results["milliseconds"].items():
        median = {side: statistics.median(ms) for side, ms in timed.items()}
        shown = [f"{median[s]:.3f} [{min(ms):.3f}-{max(ms):.3f}]" for s, ms in timed.items()]
        ratio = median["torch"] / median["ours"]
        lines.append(f"| {name} | {' | '.join(shown)} | **{ratio:.2f}** |")
    return lines


if __name__ == "__main__":
    main()
