"""``make bench-train``: finetuning alone against HF PEFT, in one run. See ``--help``."""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.train import report
from benchmarks.train.memory import measure_memory
from benchmarks.train.systems import Example, OurSystem, PeftSystem, Timed
from benchmarks.train.workload import LORA, chat_batches, make_adapter, synthetic
from flexllm_vllm.cpu_defaults import default_dtype
from flexllm_vllm.jobs.types import TARGET_MODULES, LoraSpec

LENGTHS = (256, 512, 1024, 2048)


def tokens_per_second(batches: list[list[Example]], timed: Timed) -> float:
    """Of the examples' own tokens, padding not counted; the first step warms up.

    Ours runs the next batch forward before the last one has ended: while the last trains there is
    none, and it is left out as well.
    """
    tokens = [sum(len(ids) for ids, _ in batch) for batch in batches]
    return sum(tokens[1:-1]) / sum(seconds for seconds, _ in timed[1:-1])


def compare(
    ours: dict[str, OurSystem],
    peft: PeftSystem,
    adapter: Path,
    batches: list[list[Example]],
    rounds: int,
    lora: LoraSpec = LORA,
) -> dict[str, Any]:
    """The systems in turn, ``rounds`` times; medians, and the losses of the first round."""
    speeds: dict[str, list[float]] = {name: [] for name in (*ours, "peft")}
    losses: dict[str, list[float]] = {}
    for index in range(rounds):
        for name in speeds:
            system = ours.get(name)
            if system is None:
                peft.order("reset")
                timed = peft.run(batches)
            else:
                timed = system.run(batches, lora, adapter)
            speeds[name].append(tokens_per_second(batches, timed))
            if index == 0:
                losses[name] = [loss for _, loss in timed]
    worst = max(
        abs(a - b) / b for name in ours for a, b in zip(losses[name], losses["peft"], strict=True)
    )
    return {
        "speeds": speeds,
        "median": {name: statistics.median(values) for name, values in speeds.items()},
        "losses": losses,
        "largest_loss_difference": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, help="chat JSONL file for the comparison on real data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--resume", action="store_true", help="keep what a stopped run has measured"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-train-"))
    args.out.mkdir(parents=True, exist_ok=True)
    found = args.out / "results.json"
    results = json.loads(found.read_text()) if args.resume and found.exists() else {}

    def save() -> None:
        found.write_text(json.dumps(results, indent=1) + "\n")

    try:
        run(args, folder, results, save)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.write(results, args.out)
    print((args.out / "report.md").read_text())


def run(
    args: argparse.Namespace, folder: Path, results: dict[str, Any], save: Callable[[], None]
) -> None:
    """Everything that ``results`` lacks, on one machine, one thing at a time."""
    adapter = make_adapter(args.model, folder / "adapter")
    peft = PeftSystem(folder)

    def measure(name: str, work: Callable[[], Any], group: str | None = None) -> None:
        into = results if group is None else results.setdefault(group, {})
        if name not in into:
            into[name] = work()
            save()

    def load_peft() -> None:
        peft.order(
            "load", model=args.model, adapter=str(adapter), dtype="float32", checkpointing=False
        )

    load_peft()
    measure("machine", describe)
    measure("gemm", lambda: peft.order("gemm", dtype="float32"))
    ours = {
        policy: OurSystem(args.model, folder / policy, "float32", activation_policy=policy)
        for policy in ("balanced", "store")
    }

    def compared(batches: list[list[Example]], rounds: int) -> dict[str, Any]:
        found = compare(ours, peft, adapter, batches, rounds)
        print(found["median"], flush=True)
        return found

    def short() -> dict[str, dict[str, float]]:
        """Examples of 60 tokens and of 512 in turn: the machine's speed changes meanwhile."""
        lengths = {"60": synthetic(60, 6, batch=16), "512": synthetic(512, 4)}
        speeds: dict[str, dict[str, list[float]]] = {
            name: {length: [] for length in lengths} for name in ours
        }
        for _ in range(max(3, args.rounds)):
            for name, system in ours.items():
                for length, batches in lengths.items():
                    timed = system.run(batches, LORA, adapter)
                    speeds[name][length].append(tokens_per_second(batches, timed))
        return {
            name: {length: statistics.median(found) for length, found in of.items()}
            for name, of in speeds.items()
        }

    try:
        for length in args.lengths:
            batches = synthetic(length, 6 if length <= 512 else 4)
            rounds = args.rounds if length <= 1024 else max(1, args.rounds - 1)
            measure(str(length), partial(compared, batches, rounds), "synthetic")
        for batch, count in ((1, 14), (4, 6)) if args.data is not None else ():
            batches = chat_batches(args.data, args.model, batch, count)
            measure(str(batch), partial(compared, batches, args.rounds), "real")
        measure("variants", lambda: variants(args.model, ours["store"], peft, folder))
        load_peft()
        measure("short", short)
        measure("profile", lambda: ours["store"].profile(synthetic(512, 4), LORA, adapter))
        measure("gemm_after", lambda: peft.order("gemm", dtype="float32"))
    finally:
        for system in ours.values():
            system.close()
    measure("bfloat16", lambda: bfloat16(args.model, peft, adapter, folder))
    measure("memory", lambda: measure_memory(args.model, adapter, peft, folder))
    peft.close()


def variants(model: str, ours: OurSystem, peft: PeftSystem, folder: Path) -> dict[str, Any]:
    """Other ranks, targets, and PEFT's gradient checkpointing, at 512 tokens."""
    found = {}
    batches = synthetic(512, 4)
    for name, r, targets, checkpointing in (
        ("r=64", 64, TARGET_MODULES, False),
        ("q,v", 16, ("q_proj", "v_proj"), False),
        ("checkpointing", 16, TARGET_MODULES, True),
    ):
        adapter = make_adapter(model, folder / f"adapter-{name}", r, targets)
        peft.order("load", model=model, adapter=str(adapter), dtype="float32",
                   checkpointing=checkpointing)  # fmt: skip
        lora = LoraSpec(r=r, lora_alpha=2 * r, target_modules=targets)
        found[name] = compare({"store": ours}, peft, adapter, batches, 1, lora)
        print(name, found[name]["median"], flush=True)
    return found


def bfloat16(model: str, peft: PeftSystem, adapter: Path, folder: Path) -> dict[str, Any]:
    """The model in bfloat16, where the processor has it."""
    if default_dtype() is not None:
        return {}
    peft.order("load", model=model, adapter=str(adapter), dtype="bfloat16", checkpointing=False)
    system = OurSystem(model, folder / "bfloat16", "bfloat16", activation_policy="store")
    try:
        return compare({"store": system}, peft, adapter, synthetic(512, 4), 1)
    finally:
        system.close()


if __name__ == "__main__":
    main()
