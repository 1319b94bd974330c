"""What finetuning adds to the scheduler's calls, in CPU time, with 256 requests running."""

import gc
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from benchmarks.simulate.configuration import EngineSpec, make_scheduler
from benchmarks.simulate.engine import Simulation, make_request
from benchmarks.simulate.jobs import chat_lengths, make_job
from benchmarks.simulate.machine import Machine
from benchmarks.simulate.scheduler import TimedScheduler
from benchmarks.simulate.worker import FakeWorker

PROMPT, ANSWER = 100, 3000


def measure(spec: EngineSpec, num_jobs: int, iterations: int = 1500) -> dict[str, Any]:
    """Microseconds: of our part of each call, and of stock's beside it and alone.

    Args:
        spec: of the engine; its requests decode all the time.
        num_jobs: that train.
        iterations: after the first ones, in which prompts are read.
    """
    blocks = spec.max_num_seqs * (PROMPT + ANSWER) // spec.block_size  # nobody is preempted
    spec = replace(spec, num_blocks=blocks + 10_000)
    simulation = Simulation(spec, Machine(), ())
    simulation.calibrate()
    simulation.measures = None
    for number in range(1, num_jobs + 1):
        lengths = chat_lengths(500, number)
        simulation.scheduler.feeder.submit(make_job(number, lengths, batch_size=8, n_epochs=1000))
    alone = make_scheduler(TimedScheduler, spec)
    worker = FakeWorker(spec.num_layers, 1.0, simulation.worker._layout)
    for index in range(spec.max_num_seqs):
        for scheduler in (simulation.scheduler, alone):
            scheduler.add_request(make_request(f"r{index}", [3] * PROMPT, ANSWER))
    gc.collect()
    gc.freeze()  # as vLLM's engine core does
    calls: dict[str, list[float]] = {}
    scheduler = simulation.scheduler
    for iteration in range(iterations + 100):
        simulation.step()
        output = alone.schedule()
        alone.update_from_output(output, worker.run(output)[0])
        if iteration < 100:
            continue
        for name, seconds in {
            "ours in schedule()": scheduler.own_schedule,
            "ours in update_from_output()": scheduler.own_update,
            "stock's schedule() within ours": scheduler.stock_schedule,
            "stock's schedule() alone": alone.stock_schedule,
            "stock's update_from_output() alone": alone.stock_update,
        }.items():
            calls.setdefault(name, []).append(1e6 * seconds)
    gc.unfreeze()
    return {
        "requests": len(scheduler.running),
        "jobs": num_jobs,
        "iterations": iterations,
        "us": {
            name: {"median": median(us), "p99": float(np.quantile(us, 0.99))}
            for name, us in calls.items()
        },
    }
