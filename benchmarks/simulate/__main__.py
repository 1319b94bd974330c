"""``make simulate``: hours of traffic through the real scheduler, without a model behind it."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.simulate import cost, report
from benchmarks.simulate.configuration import EngineSpec
from benchmarks.simulate.engine import Simulation
from benchmarks.simulate.jobs import chat_lengths, make_job
from benchmarks.simulate.machine import Machine
from benchmarks.simulate.traffic import arrivals

EXAMPLES, BATCH_SIZE = 500, 8
LAST_WEIGHT = 2.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0, help="virtual; one day's course")
    parser.add_argument("--jobs", type=int, default=4, help="equal ones but the last: weight 2")
    parser.add_argument("--peak", type=float, default=8.0, help="requests a second at noon")
    parser.add_argument("--kv-blocks", type=int, default=20_000, help="of 16 tokens")
    parser.add_argument("--tpot-slo-ms", type=float, help="target; auto without it")
    parser.add_argument(
        "--roofline", action="store_true", help="a machine that no linear model fits everywhere"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def simulate(args: argparse.Namespace, spec: EngineSpec) -> Simulation:
    """Runs the jobs, which never end, beside the traffic."""
    seconds = 3600 * args.hours
    traffic = arrivals(seconds, args.peak, args.seed)
    simulation = Simulation(spec, Machine(args.seed, roofline=args.roofline), traffic)
    simulation.calibrate()
    lengths = chat_lengths(EXAMPLES, args.seed)
    for number in range(1, args.jobs + 1):
        last = number == args.jobs > 1
        simulation.submit(
            make_job(
                number,
                lengths,
                batch_size=BATCH_SIZE,
                n_epochs=10_000,
                weight=LAST_WEIGHT if last else 1.0,
            )
        )
    simulation.run(seconds)
    return simulation


def main() -> None:
    args = parse()
    spec = EngineSpec(num_blocks=args.kv_blocks)
    finetuning = replace(spec.finetuning, max_jobs=max(1, args.jobs), tpot_slo_ms=args.tpot_slo_ms)
    spec = replace(spec, finetuning=finetuning)
    began = time.monotonic()
    simulation = simulate(args, spec)
    results = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": describe(),
        "run": report.figures(simulation, 3600 * args.hours),
        "cost": cost.measure(spec, args.jobs),
        "minutes": (time.monotonic() - began) / 60,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "report.md").write_text("\n".join(report.lines(results)) + "\n")
    print((args.out / "report.md").read_text())


if __name__ == "__main__":
    main()
