"""The engine's loop in virtual time."""

import queue
from collections.abc import Callable, Iterable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from benchmarks.simulate.configuration import EngineSpec, make_scheduler
from benchmarks.simulate.machine import Machine
from benchmarks.simulate.measures import Measures
from benchmarks.simulate.scheduler import SimulatedScheduler
from benchmarks.simulate.traffic import Arrival
from benchmarks.simulate.worker import FakeWorker
from flexllm_vllm.plan import AdapterLayout
from flexllm_vllm.scheduler.feeder import ClaimedJob

TOKENS_PER_PAGE = 32


def layout_of(spec: EngineSpec, lowest_layer: int = 0) -> AdapterLayout:
    """The activation cache that the flags ask for, of an adapter on all linear layers."""
    pages = spec.finetuning.activation_cache_tokens // TOKENS_PER_PAGE
    return AdapterLayout(TOKENS_PER_PAGE, pages, lowest_layer, TOKENS_PER_PAGE)


def make_request(
    name: str,
    prompt: list[int],
    output_tokens: int,
    time: float = 0.0,
    block_hasher: Callable[[Request], list[Any]] | None = None,
) -> Request:
    """A request that ends after ``output_tokens``.

    Args:
        name: its id.
        prompt: token ids.
        output_tokens: of its answer.
        time: of its arrival, in seconds.
        block_hasher: makes the keys of its blocks in the prefix cache.
    """
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0),
        pooling_params=None,
        arrival_time=time,
        block_hasher=block_hasher,
    )


class Simulation:
    """An engine whose iterations take as long as a made-up machine says.

    It has what the scheduler wants of vLLM's engine core: ``step``, ``is_running``,
    ``input_queue``.

    Args:
        spec: of the engine.
        machine: says how long iterations take.
        traffic: requests, in order of time.

    Attributes:
        now: virtual seconds.
        measures: of the iterations since the calibration.
        weights: of the jobs.
    """

    def __init__(self, spec: EngineSpec, machine: Machine, traffic: Iterable[Arrival]) -> None:
        self.now = 0.0
        self.scheduler = make_scheduler(SimulatedScheduler, spec, clock=lambda: self.now)
        shape = self.scheduler.planner.shape
        self.worker = FakeWorker(shape.num_layers, shape.loss_head_layers, layout_of(spec))
        self.measures: Measures | None = None
        self.weights: dict[str, float] = {}
        self.input_queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._machine = machine
        self._traffic = iter(traffic)
        self._next = next(self._traffic, None)
        self._num_requests = 0

    def is_running(self) -> bool:
        return True

    def calibrate(self) -> None:
        """What the engine does before it serves. Time begins when it is done."""
        self.scheduler.attach_engine(self)
        self.now = 0.0
        self.measures = Measures()

    def submit(self, claimed: ClaimedJob) -> None:
        """Gives the engine a job. Those with the weight of the first are taken as equal to it."""
        job = claimed.job
        self.weights[job.id] = job.training.scheduling_weight
        if self.measures is not None:
            first = next(iter(self.weights.values()))
            self.measures.equal_jobs = tuple(i for i, w in self.weights.items() if w == first)
        self.scheduler.feeder.submit(claimed)

    def run(self, seconds: float) -> None:
        """Runs until so many virtual seconds have passed."""
        while self.now < seconds:
            self._receive()
            if self.scheduler.has_requests():
                self.step()
            else:
                self.now = min(seconds, self._next.time if self._next else seconds)

    def _receive(self) -> None:
        while self._next is not None and self._next.time <= self.now:
            name = f"request-{self._num_requests}"
            arrival, self._next = self._next, next(self._traffic, None)
            self._num_requests += 1
            self.scheduler.add_request(
                make_request(name, [3] * arrival.prompt_tokens, arrival.output_tokens, arrival.time)
            )
            if self.measures is not None:
                self.measures.arrived(name, arrival)

    def step(self) -> None:
        """One iteration."""
        scheduler = self.scheduler
        began = self.now
        output = scheduler.schedule()
        answer, contents = self.worker.run(output)
        running = len(scheduler.running)
        duration, alone = self._machine.seconds(contents, began)
        self.now += duration
        outputs = scheduler.update_from_output(output, answer)
        if self.measures is not None:
            self.measures.iteration(
                contents,
                began=began,
                duration=duration,
                alone=alone,
                target_ms=scheduler.target_ms,
                ready=sum(loop.ready for loop in scheduler.planner.loops.values()),
                running=running,
                own_schedule=scheduler.own_schedule,
                own_update=scheduler.own_update,
            )
            self.measures.steps(self.worker.steps)
            for answers in outputs.values():
                for answer in answers.outputs:
                    self.measures.tokens(
                        answer.request_id, len(answer.new_token_ids), answer.finished, self.now
                    )
