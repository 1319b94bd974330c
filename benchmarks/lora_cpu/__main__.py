"""``make bench-lora``: LoRA inference on CPU, stock vLLM against a finetuning server.

Three engines in turn: stock vLLM without LoRA, stock vLLM with ``enable_lora``, and ours with no
job running. Milliseconds of an engine iteration, without HTTP.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.engine import Engine
from benchmarks.machine import describe
from benchmarks.train.workload import R, make_adapter

DECODE_ROWS = (1, 4, 8)
PREFILL_TOKENS = (64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-lora-") as name:
        results = run(args.model, args.rounds, Path(name))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "report.md").write_text("\n".join(_lines(results)) + "\n")
    print((args.out / "report.md").read_text())


def run(model: str, rounds: int, folder: Path) -> dict[str, Any]:
    adapter = str(make_adapter(model, folder / "adapter"))
    engines = {
        "stock": Engine(model, folder / "stock.log", dtype="float32"),
        "stock, LoRA enabled": Engine(
            model, folder / "lora.log", dtype="float32", enable_lora=True, max_lora_rank=R,
            max_loras=1,
        ),
        "ours": Engine(model, folder / "ours.log", folder / "store", dtype="float32"),
    }  # fmt: skip
    logprobs = {name: engines[name].logprobs(200, adapter) for name in list(engines)[1:]}
    expected, got = logprobs.values()
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for rows in DECODE_ROWS:
            for name, engine in engines.items():
                cells[f"decode, {rows} base rows"][name].append(engine.decode_ms(rows))
            for name in logprobs:
                cells[f"decode, {rows} adapter rows"][name].append(
                    engines[name].decode_ms(rows, adapter=adapter)
                )
        for tokens in PREFILL_TOKENS:
            for name, engine in engines.items():
                cells[f"prefill, {tokens} base tokens"][name].append(engine.prefill_ms(tokens))
            for name in logprobs:
                cells[f"prefill, {tokens} adapter tokens"][name].append(
                    engines[name].prefill_ms(tokens, adapter)
                )
    for engine in engines.values():
        engine.close()
    return {
        "machine": describe(),
        "cells": cells,
        "largest_logprob_difference": max(
            abs(a - b) / max(1.0, abs(b)) for a, b in zip(got, expected, strict=True)
        ),
    }


def _lines(results: dict[str, Any]) -> list[str]:
    machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    names = ("stock", "stock, LoRA enabled", "ours")
    lines = [
        "# LoRA inference on CPU",
        "",
        f"{machine}. SmolLM2-135M, float32, adapter r={R} on all linears. Milliseconds of an "
        "iteration: median of interleaved rounds, range in brackets.",
        "",
        f"| iteration | {' | '.join(names)} | stock / ours | stock with LoRA / ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell, timed in results["cells"].items():
        median = {name: statistics.median(ms) for name, ms in timed.items()}
        shown = [
            f"{median[n]:.1f} [{min(timed[n]):.1f}-{max(timed[n]):.1f}]" if n in timed else ""
            for n in names
        ]
        ratios = [f"**{median[n] / median['ours']:.2f}**" if n in median else "" for n in names[:2]]
        lines.append(f"| {cell} | {' | '.join((*shown, *ratios))} |")
    difference = results["largest_logprob_difference"]
    return [
        *lines,
        "",
        "Log-probabilities of 200 prompt tokens with the adapter differ from stock vLLM's by at "
        f"most {difference:.1e}, relative.",
    ]


if __name__ == "__main__":
    main()
