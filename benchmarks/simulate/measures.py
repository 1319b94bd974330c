"""What a simulation is asked about, collected iteration by iteration."""

from array import array
from dataclasses import dataclass, field

import numpy as np

from benchmarks.simulate.machine import Contents
from benchmarks.simulate.traffic import Arrival


@dataclass
class _Answer:
    arrived: float
    first: float = 0.0
    tokens: int = 0


@dataclass
class Measures:
    """Columns of the iterations, and the times of the requests. Times are in seconds.

    Attributes:
        columns: one value an iteration, by name; see :meth:`iteration`.
        ttft: from arrival to the first token.
        tpot: mean time of the tokens after the first.
        unequal_steps: most by which the optimizer steps of ``equal_jobs`` ever differed.
        equal_jobs: jobs with the same data and weight.
    """

    columns: dict[str, array] = field(default_factory=dict)
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    unequal_steps: int = 0
    equal_jobs: tuple[str, ...] = ()
    _answers: dict[str, _Answer] = field(default_factory=dict)

    def iteration(
        self,
        contents: Contents,
        *,
        began: float,
        duration: float,
        alone: float,
        target_ms: float | None,
        ready: int,
        running: int,
        own_schedule: float,
        own_update: float,
    ) -> None:
        """Takes in an iteration.

        Args:
            contents: what it held.
            began: when.
            duration: how long it took.
            alone: how long it would have taken without finetuning.
            target_ms: longest it was to take because of finetuning; None where nothing ran.
            ready: jobs that could train.
            running: requests.
            own_schedule, own_update: CPU seconds that finetuning added to the scheduler's calls.
        """
        values = {
            "began": began,
            "duration": duration,
            "alone": alone,
            "target": np.nan if target_ms is None else target_ms / 1e3,
            "inference": contents.has_inference,
            "finetuning": contents.has_finetuning,
            "forward": contents.forward_tokens,
            "backward": contents.backward_tokens,
            "decode": contents.decode_rows,
            "prefill": contents.prefill_tokens,
            "ready": ready,
            "running": running,
            "own_schedule": own_schedule,
            "own_update": own_update,
        }
        for name, value in values.items():
            self.columns.setdefault(name, array("d")).append(value)

    def arrived(self, name: str, arrival: Arrival) -> None:
        self._answers[name] = _Answer(arrival.time)

    def tokens(self, name: str, count: int, finished: bool, now: float) -> None:
        """A request was given tokens."""
        answer = self._answers[name]
        if answer.tokens == 0 and count > 0:
            answer.first = now
            self.ttft.append(now - answer.arrived)
        answer.tokens += count
        if finished:
            del self._answers[name]
            if answer.tokens > 1:
                self.tpot.append((now - answer.first) / (answer.tokens - 1))

    def steps(self, steps: dict[str, int]) -> None:
        """Optimizer steps of each job so far."""
        counts = [steps.get(job_id, 0) for job_id in self.equal_jobs]
        if counts:
            self.unequal_steps = max(self.unequal_steps, max(counts) - min(counts))

    def column(self, name: str) -> np.ndarray:
        return np.array(self.columns[name])
