"""The figures of a simulation, and the report made of them."""

from typing import Any

import numpy as np

from benchmarks.simulate.engine import Simulation
from benchmarks.simulate.measures import Measures

GOAL_ATTAINED = 0.99
GOAL_US = 100.0


def figures(simulation: Simulation, seconds: float) -> dict[str, Any]:
    """Plain numbers; times in seconds unless the name says otherwise."""
    measures, worker = simulation.measures, simulation.worker
    assert measures is not None
    column = measures.column
    inference, finetuning = column("inference") > 0, column("finetuning") > 0
    mixed, empty = inference & finetuning, ~inference & ~finetuning
    late = column("duration") > column("target")
    ours = late & (column("alone") <= column("target"))
    idle_s, busy_s = (float(column("duration")[x].sum()) for x in (~inference, inference))
    tokens = (column("forward") + 2 * column("backward")) / 3
    model = simulation.scheduler.latency_model
    jobs = {job_id: worker.trained[job_id] for job_id in worker.trained if job_id != "calibration"}
    return {
        "iterations": len(inference),
        "requests": len(measures.ttft),
        "most_running": int(column("running").max()),
        "seconds_busy": busy_s,
        "seconds_idle": idle_s,
        "slo": {
            "iterations": int((inference & ~np.isnan(column("target"))).sum()),
            "attained": _share(~late, inference),
            "mixed_iterations": int(mixed.sum()),
            "mixed_attained": _share(~late, mixed),
            "late_because_of_finetuning": _share(ours, inference),
            "mixed_of_inference": _share(finetuning, inference),
        },
        "tokens_per_s": {
            "idle": float(tokens[~inference].sum()) / max(idle_s, 1e-9),
            "busy": float(tokens[inference].sum()) / max(busy_s, 1e-9),
        },
        "starvation_s": starvation(measures, seconds),
        "empty_iterations": int(empty.sum()),
        "jobs": {
            job_id: {
                "tokens": trained,
                "tokens_for_its_weight": trained / simulation.weights[job_id],
                "weight": simulation.weights[job_id],
                "steps": worker.steps[job_id],
            }
            for job_id, trained in jobs.items()
        },
        "unequal_steps": measures.unequal_steps,
        "equal_jobs": len(measures.equal_jobs),
        "dropped_packs": worker.num_dropped,
        "model": {"mape": model.mape, "margin": model.margin, "ms": model.coefficients},
        "ttft": _quantiles(measures.ttft),
        "tpot": _quantiles(measures.tpot),
        "own_us": {
            "schedule": _quantiles((1e6 * column("own_schedule")).tolist()),
            "update_from_output": _quantiles((1e6 * column("own_update")).tolist()),
        },
    }


def starvation(measures: Measures, seconds: float) -> float:
    """Longest time in which a job was ready and no finetuning ran."""
    began, duration = measures.column("began"), measures.column("duration")
    ran = measures.column("finetuning") > 0
    ready = measures.column("ready") > 0
    if not ready.any():
        return 0.0
    first = began[ready.argmax()]
    ends = [first, *(began + duration)[ran & ready]]
    starts = [*began[ran & ready], min(seconds, began[-1])]
    return float(max(0.0, *(b - a for a, b in zip(ends, starts, strict=True))))


def lines(results: dict[str, Any]) -> list[str]:
    """The report in Markdown."""
    run, cost, settings = results["run"], results["cost"], results["settings"]
    slo, tokens = run["slo"], run["tokens_per_s"]
    jobs = run["jobs"]
    fair = [job["tokens_for_its_weight"] for job in jobs.values()]
    own = cost["us"]["ours in schedule()"]
    rows = {
        "iterations with requests within their target": f"{slo['attained']:.2%} of "
        f"{slo['iterations']} ({_verdict(slo['attained'] >= GOAL_ATTAINED)}: goal 99%)",
        "... of those that held finetuning": f"{slo['mixed_attained']:.2%} of "
        f"{slo['mixed_iterations']}",
        "... late because of finetuning": f"{slo['late_because_of_finetuning']:.2%}",
        "... late with or without it (prompts, stalls)": (
            f"{1 - slo['attained'] - slo['late_because_of_finetuning']:.2%}"
        ),
        "iterations with requests that held finetuning": f"{slo['mixed_of_inference']:.1%}",
        "finetuning tokens/s without requests": f"{tokens['idle']:,.0f} in "
        f"{run['seconds_idle']:,.0f} s",
        "finetuning tokens/s beside requests": f"{tokens['busy']:,.0f} in "
        f"{run['seconds_busy']:,.0f} s ({tokens['busy'] / max(tokens['idle'], 1e-9):.0%} of it)",
        "longest time without finetuning": f"{run['starvation_s']:.1f} s",
        "iterations that held nothing": f"{run['empty_iterations']}",
        "tokens for their weight, most served job / least": (
            f"{max(fair) / min(fair):.3f}" if fair else "-"
        ),
        f"steps by which {run['equal_jobs']} equal jobs ever differed": f"{run['unequal_steps']}",
        "packs dropped": f"{run['dropped_packs']}",
        "latency model: mean error, margin": f"{run['model']['mape']:.1%}, "
        f"{run['model']['margin']:.2f}",
        "TTFT of requests, median / p99": _pair(run["ttft"]),
        "TPOT of requests, median / p99": _pair(run["tpot"]),
    }
    return [
        "# Simulation",
        "",
        f"{settings['hours']:g} h of traffic ({run['requests']:,} requests, at most "
        f"{run['most_running']} at once), {settings['jobs']} jobs, seed {settings['seed']}: "
        f"{run['iterations']:,} iterations through the real scheduler, KV cache manager and "
        "latency model. The machine is made up (`machine.py`: a 70B model on 8 GPUs of 40 GB), "
        "time is virtual; of a token a third counts when it runs forward, the rest when backward.",
        "",
        "| what | simulated |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "| job | weight | tokens | for its weight | optimizer steps |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {job['weight']:g} | {job['tokens']:,.0f} | "
            f"{job['tokens_for_its_weight']:,.0f} | {job['steps']} |"
            for name, job in jobs.items()
        ),
        "",
        f"Cost of the scheduler's calls with {cost['requests']} requests decoding and "
        f"{cost['jobs']} jobs, microseconds of CPU time on {results['machine']['processor']}; our "
        f"part of `schedule()` is {own['median']:.0f} at the median "
        f"({_verdict(own['median'] < GOAL_US)}: goal below {GOAL_US:.0f}).",
        "",
        "| call | median | p99 |",
        "| --- | --- | --- |",
        *(f"| {name} | {us['median']:.0f} | {us['p99']:.0f} |" for name, us in cost["us"].items()),
    ]


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _share(what: np.ndarray, of: np.ndarray) -> float:
    return float(what[of].mean()) if of.any() else 1.0


def _quantiles(values: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(values, [0.5, 0.99]) if values else (0.0, 0.0)
    return {"median": float(p50), "p99": float(p99)}


def _pair(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['median']:.0f} / {1e3 * seconds['p99']:.0f} ms"
