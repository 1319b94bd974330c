"""A record of what the last iterations held, and how long they took."""

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from flexllm_vllm.scheduler.latency_model import IterationWork

CAPACITY = 8192


@dataclass(frozen=True)
class Iteration:
    """One engine iteration.

    Attributes:
        start_time: seconds since the epoch.
        duration_ms: from the begin of scheduling until the outputs were processed.
        target_ms: longest that it was to take because of finetuning; None where there was none to
            run, or nothing was known yet.
        predicted_ms: by the latency model, from what it held.
        decode_tokens: inference tokens of requests past their prompt.
        prefill_tokens: inference tokens of prompts.
        finetuning_forward_tokens: finetuning rows of the fused forward.
        finetuning_backward_tokens: token-layers (a token in one decoder layer) run backward.
        finetuning_loss_tokens: tokens that carry loss whose loss head, or score, has run.
    """

    start_time: float
    duration_ms: float
    target_ms: float | None
    predicted_ms: float
    decode_tokens: int
    prefill_tokens: int
    finetuning_forward_tokens: int
    finetuning_backward_tokens: int
    finetuning_loss_tokens: int


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


def inference_work(scheduler_output: Any) -> IterationWork:
    """Decode rows and prompt tokens of a ``SchedulerOutput``, hidden rows counted as prompts."""
    cached = scheduler_output.scheduled_cached_reqs
    drafts = scheduler_output.scheduled_spec_decode_tokens
    total = scheduler_output.total_num_scheduled_tokens
    if total == len(cached.req_ids) and not drafts and 0 not in cached.num_output_tokens:
        # One token each, past their prompts: the usual case, of up to thousands of requests.
        context = sum(cached.num_computed_tokens)
        return IterationWork(decode_rows=float(total), decode_context=context / 1000)
    decode = context = 0
    for req_id, outputs, computed in zip(
        cached.req_ids, cached.num_output_tokens, cached.num_computed_tokens, strict=True
    ):
        tokens = scheduler_output.num_scheduled_tokens[req_id]
        # More than that: a preempted request, computed again.
        if outputs > 0 and tokens <= 1 + len(drafts.get(req_id, ())):
            decode += tokens
            context += computed
    return IterationWork(
        decode_rows=float(decode),
        decode_context=context / 1000,
        prefill_tokens=float(total - decode),
    )
