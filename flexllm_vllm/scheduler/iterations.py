"""A record of what the last iterations held, and how long they took."""

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

CAPACITY = 8192


@dataclass(frozen=True)
class Iteration:
    """One engine iteration.

    Attributes:
        start_time: seconds since the epoch.
        duration_ms: from the begin of scheduling until the outputs were processed.
        decode_tokens: inference tokens of requests past their prompt.
        prefill_tokens: inference tokens of prompts.
        finetuning_forward_tokens: finetuning rows of the fused forward.
        finetuning_backward_tokens: token-layers (a token in one decoder layer) run backward.
    """

    start_time: float
    duration_ms: float
    decode_tokens: int
    prefill_tokens: int
    finetuning_forward_tokens: int
    finetuning_backward_tokens: int


class IterationLog:
    """The last ``CAPACITY`` iterations."""

    def __init__(self) -> None:
        self._log: deque[Iteration] = deque(maxlen=CAPACITY)

    def add(self, iteration: Iteration) -> None:
        self._log.append(iteration)

    def last(self, count: int) -> list[dict[str, Any]]:
        """The last ``count`` iterations, oldest first, as plain dicts."""
        if count <= 0:
            return []
        return [asdict(i) for i in list(self._log)[-count:]]


def count_inference_tokens(scheduler_output: Any) -> tuple[int, int]:
    """Decode and prefill tokens of a stock ``SchedulerOutput``."""
    cached = scheduler_output.scheduled_cached_reqs
    decode = sum(
        scheduler_output.num_scheduled_tokens[req_id]
        for req_id, outputs in zip(cached.req_ids, cached.num_output_tokens, strict=True)
        if outputs > 0
    )
    return decode, scheduler_output.total_num_scheduled_tokens - decode
