"""Measures cells: a system under a load. Each is written to disk as soon as it is there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.coserve.figures import TARGET_MULTIPLE, latencies, tpots_ms
from benchmarks.coserve.loads import BUSY, LOADS, is_busy
from benchmarks.coserve.systems import IDLE, SERVING, Systems, awake


@dataclass(frozen=True)
class Settings:
    """What a run measures, and how; times in seconds.

    Attributes:
        model, data: folder of the model; training file, None for synthetic examples.
        seconds, warm_up: of a cell's window, and of its load before that.
        systems, loads: that are measured.
        sweep: latency targets of the sweep, as multiples of stock's median TPOT.
        sweep_load, sweep_seconds: at which load, and the window.
        explicit_target: our server is started anew for each load, with 2.5 times stock's TPOT.
        ours_flags: more flags of our server.
        seed: of lengths, arrivals and tokens.
    """

    model: str
    data: str | None
    seconds: float
    warm_up: float
    systems: tuple[str, ...]
    loads: tuple[str, ...]
    sweep: tuple[float, ...]
    sweep_load: str
    sweep_seconds: float
    explicit_target: bool
    ours_flags: tuple[str, ...]
    seed: int

    def differs_from(self, other: dict[str, Any]) -> list[str]:
        """Settings that make cells of two runs incomparable."""
        choices = ("systems", "loads", "sweep")
        mine = json.loads(json.dumps(asdict(self)))
        return [k for k, v in mine.items() if k not in choices and other.get(k) != v]


class Results:
    """``results.json``.

    Args:
        path: of the file.
        values: of a run that is continued, or what is known at the start of one.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path = path
        self.values = values
        self.cells: dict[str, dict[str, Any]] = values.setdefault("cells", {})

    def add(self, key: str, cell: dict[str, Any]) -> None:
        self.cells[key] = cell
        self.write()

    def write(self) -> None:
        """In one piece: a run that is killed leaves the file as it was or as it is."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.values, indent=1) + "\n")
        new.replace(self._path)

    def stock_tpot_ms(self, load: str) -> float | None:
        cell = self.cells.get(f"{load}/stock")
        return cell["latency"]["tpot_p50_ms"] if cell else None

    def capacity(self) -> float | None:
        """Most output tokens/s of stock vLLM."""
        cells = [self.cells.get(f"{load}/stock") for load in BUSY]
        return max((c["latency"]["output_tokens_per_s"] for c in cells if c), default=None)


class Bench:
    """Fills the results."""

    def __init__(self, settings: Settings, systems: Systems, results: Results) -> None:
        self._settings = settings
        self._systems = systems
        self._results = results

    def run(self) -> None:
        """Everything that the settings name and the results lack."""
        s = self._settings
        idle = [name for name in IDLE if name in s.systems]
        for trainer in idle:
            self.cell(f"idle/{trainer}", trainer, "idle")
        loads = sorted(s.loads, key=LOADS.index)
        for load in loads:
            for name in SERVING:
                if name in s.systems:
                    explicit = s.explicit_target and name == "coserve"
                    multiple = TARGET_MULTIPLE if explicit else None
                    self.cell(f"{load}/{name}", name, load, multiple=multiple)
        if "alone" in idle and loads:
            self.cell("idle/alone again", "alone", "idle")
        if "stock" in s.systems and loads:
            self.cell(f"{loads[0]}/stock again", "stock", loads[0])
        for multiple in s.sweep if "coserve" in s.systems else ():
            key = f"{s.sweep_load}/coserve x{multiple:g}"
            self.cell(key, "coserve", s.sweep_load, s.sweep_seconds, multiple)

    def cell(
        self,
        key: str,
        name: str,
        load: str,
        seconds: float | None = None,
        multiple: float | None = None,
    ) -> None:
        """Measures one, unless it is there.

        Args:
            key: of the results.
            name, load: system and load.
            seconds: of the window; None: as the settings say.
            multiple: of stock's median TPOT, given to our server as its target; None: auto.
        """
        if key in self._results.cells:
            print(f"{key:24} is there", flush=True)
            return
        base = self._results.stock_tpot_ms(load)
        if multiple is not None and base is None:
            print(f"{key:24} needs {load}/stock, which was not measured", flush=True)
            return
        slo = multiple * base if multiple is not None and base is not None else None
        system = self._systems.get(name, slo)
        window = seconds or self._settings.seconds
        capacity = None if is_busy(load) else self._results.capacity()
        with awake(system):
            record = self._systems.run(system, load, self._settings.warm_up, window, capacity)
            trained = system.training.trained(record) if system.training else None
        if name == "stock" and base is None and (tpots := tpots_ms(record)):
            base = median(tpots)
        target = base and (multiple or TARGET_MULTIPLE) * base
        found = latencies(record, target) if system.server and load != "idle" else None
        if found and found.num_failed and not found.output_tokens_per_s:
            raise RuntimeError(f"no request of {key} succeeded: {found.first_error}")
        self._results.add(
            key,
            {
                "system": name,
                "load": load,
                "seconds": window,
                "target_ms": target,
                "server_slo_ms": slo,
                "latency": found and asdict(found),
                "training": trained and asdict(trained),
                "client_cpu": record.client_cpu,
            },
        )
        print(summary(key, self._results.cells[key]), flush=True)


def summary(key: str, cell: dict[str, Any]) -> str:
    """One line."""
    parts = [f"{key:24}"]
    if latency := cell["latency"]:
        for name in ("ttft", "tpot", "itl"):
            p50, p99 = (latency[f"{name}_p{p}_ms"] for p in (50, 99))
            if p50 is not None:
                parts.append(f"{name.upper()} {p50:.0f}/{p99:.0f} ms")
        parts.append(f"{latency['output_tokens_per_s']:.1f} tokens/s")
        if latency["within_target"] is not None:
            parts.append(f"{latency['within_target']:.2%} in {cell['target_ms']:.0f} ms")
        parts.append(f"{latency['num_done']} done")
        if latency["num_failed"]:
            parts.append(f"{latency['num_failed']} FAILED: {latency['first_error']}")
    if training := cell["training"]:
        parts.append(f"trains {training['tokens_per_s']:.1f} tokens/s")
        if training["steps_per_s"] is not None:
            parts.append(f"(by steps {training['steps_per_s']:.1f})")
    return "  ".join(parts)
