"""``make bench-coserve``: inference and finetuning at once, in one run. See ``--help``."""

import argparse
import json
import shlex
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.coserve import plots, report
from benchmarks.coserve.cells import Bench, Results, Settings
from benchmarks.coserve.data import write_examples
from benchmarks.coserve.loads import LOADS
from benchmarks.coserve.processes import ended_on_exit
from benchmarks.coserve.servers import FLAGS
from benchmarks.coserve.systems import SYSTEMS, Systems
from benchmarks.engine import all_cores
from benchmarks.machine import describe

SWEEP = (1.5, 2.0, 2.5, 4.0, 6.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", help="training file, JSONL; synthetic examples without it")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a cell's window")
    parser.add_argument("--warm-up", type=float, default=8.0, help="seconds of load before it")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument(
        "--sweep", nargs="*", type=float, default=SWEEP,
        help="latency targets, as multiples of stock's median TPOT; none: no sweep",
    )  # fmt: skip
    parser.add_argument("--sweep-load", choices=LOADS, default="busy-2")
    parser.add_argument("--sweep-seconds", type=float, default=30.0)
    parser.add_argument(
        "--explicit-target",
        action="store_true",
        help="start our server anew for each load, with 2.5 times stock's median TPOT in place of "
        "its own estimate",
    )
    parser.add_argument("--ours-flags", default="", help="more flags of our server, in one string")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--resume", action="store_true", help="keep the cells that are there")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        model=Path(args.model).name,
        data=args.data and Path(args.data).name,
        seconds=args.seconds,
        warm_up=args.warm_up,
        systems=tuple(args.systems),
        loads=tuple(args.loads),
        sweep=tuple(args.sweep),
        sweep_load=args.sweep_load,
        sweep_seconds=args.sweep_seconds,
        explicit_target=args.explicit_target,
        ours_flags=tuple(shlex.split(args.ours_flags)),
        seed=args.seed,
    )


def open_results(path: Path, settings: Settings, resume: bool) -> Results:
    """New ones, or those of a run that is continued.

    Raises:
        SystemExit: the run was another one.
    """
    values: dict[str, Any] = {"minutes": 0.0, "starts": []}
    if resume and path.exists():
        values = json.loads(path.read_text())
        if names := settings.differs_from(values["settings"]):
            raise SystemExit(f"{path} was measured with another {', '.join(names)}")
    threads = {k: Path(v).name for k, v in all_cores().items()}
    return Results(
        path,
        values
        | {
            "settings": asdict(settings),
            "machine": describe(),
            "conditions": {"flags": shlex.join(FLAGS), "environment": threads},
        },
    )


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(args)
    results = open_results(args.out / "results.json", settings, args.resume)
    folder = Path(tempfile.mkdtemp(prefix="bench-coserve-"))
    print(f"# logs are in {folder} until the run succeeds", flush=True)
    began = time.monotonic()
    with ended_on_exit():
        data = folder / "train.jsonl"
        source = Path(args.data) if args.data else None
        write_examples(source, args.model, data, args.seed)
        systems = Systems(args.model, data, folder, settings.ours_flags, args.seed)
        try:
            Bench(settings, systems, results).run()
            systems.end()
        finally:
            results.values["starts"] += systems.starts
            results.values["minutes"] += (time.monotonic() - began) / 60
            results.write()
            report.write(results.values, args.out)
            plots.write(results.values, args.out)
    shutil.rmtree(folder, ignore_errors=True)
    print((args.out / "report.md").read_text())


if __name__ == "__main__":
    main()
