"""Finetuning sequences as rows of vLLM's batch that vLLM's scheduler does not know of.

They own KV blocks like a request, but never enter the scheduler's queues nor the prefix cache, and
never sample: of a sequence of ``n`` tokens only the first ``n - 1`` are rows, so that vLLM sees an
unfinished prompt in every window.
"""

from dataclasses import dataclass, fields
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from flexllm_vllm.plan import ForwardWindow, StepPlan
from flexllm_vllm.scheduler.pack import Pack, Sequence

_FIELDS = tuple(f.name for f in fields(SchedulerOutput))


@dataclass
class FinetuningSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output with the finetuning part of the iteration."""

    finetuning: StepPlan | None = None


class HiddenRows:
    """KV blocks and batch rows of finetuning sequences.

    Args:
        scheduler: vLLM's scheduler.
        max_rows: rows an iteration may hold beyond the user's ``max_num_seqs``.
    """

    def __init__(self, scheduler: Any, max_rows: int) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        # The unpatched method: a finetuning row must not push out finetuning rows.
        self._allocate = self._manager.allocate_slots
        self.max_rows = max_rows
        self.block_size: int = scheduler.block_size
        self.num_blocks: int = scheduler.kv_cache_config.num_blocks - 1  # block 0 is vLLM's null
        self._rows: list[tuple[Sequence, int, Any]] = []

    def fits(self, pack: Pack, promised: int) -> bool:
        """Whether a pack can get its KV blocks without soon being in inference's way.

        Args:
            pack: that is to be opened.
            promised: blocks that open packs will ask for.

        Every running request may ask for a block in its next steps; they are left alone.
        """
        free = self._manager.block_pool.get_num_free_blocks()
        reserve = min(len(self._scheduler.running), self.num_blocks // 2)
        return pack.num_blocks(self.block_size) <= free - reserve - promised

    def open(self, pack: Pack, lora: LoRARequest | None) -> None:
        """Makes vLLM's view of a pack's sequences; without ``lora``, of the base model."""
        for index, sequence in enumerate(pack.sequences):
            request = Request(
                request_id=f"finetuning-{pack.pack_id}-{index}",
                prompt_token_ids=sequence.token_ids,
                sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
                pooling_params=None,
                lora_request=lora,
            )
            request.status = RequestStatus.RUNNING
            sequence.request = request

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Adds the next ``num_tokens`` of a sequence to this iteration; False without blocks."""
        request = sequence.request
        assert request is not None
        blocks = self._allocate(request, num_tokens, delay_cache_blocks=True)
        if blocks is None:
            return False
        self._rows.append((sequence, num_tokens, blocks))
        return True

    def close(self, pack: Pack) -> None:
        """Frees the KV blocks of a pack, and tells the worker to forget its rows."""
        for sequence in pack.sequences:
            request, sequence.request = sequence.request, None
            if request is not None:
                self._rows = [row for row in self._rows if row[0] is not sequence]
                self._manager.free(request)
                self._scheduler.finished_req_ids.add(request.request_id)

    def discard(self) -> None:
        """Leaves the rows of this iteration out of it."""
        self._rows = []

    @property
    def num_rows(self) -> int:
        """Rows of this iteration so far."""
        return len(self._rows)

    def attach(self, output: SchedulerOutput, plan: StepPlan) -> FinetuningSchedulerOutput:
        """The iteration's output with our rows and plan in it; empties the list of rows."""
        cached = output.scheduled_cached_reqs
        for sequence, num_tokens, blocks in self._rows:
            request = sequence.request
            assert request is not None
            if request.num_computed_tokens == 0:
                ids = self._manager.get_blocks(request.request_id).get_block_ids()
                # Model runner V2 wants the tokens by this name, V1 has no use for them.
                tokens = request._all_token_ids if self._scheduler.use_v2_model_runner else None
                output.scheduled_new_reqs.append(NewRequestData.from_request(request, ids, tokens))
            else:
                cached.req_ids.append(request.request_id)
                cached.new_block_ids.append(blocks.get_block_ids(allow_none=True))
                cached.num_computed_tokens.append(request.num_computed_tokens)
                cached.num_output_tokens.append(0)
            output.num_scheduled_tokens[request.request_id] = num_tokens
            output.total_num_scheduled_tokens += num_tokens
            request.num_computed_tokens += num_tokens
            # vLLM frees the blocks that fell out of a sliding window, as far as no step in flight
            # reads them. The backward still will.
            request.num_in_flight_tokens = request.num_computed_tokens
        self._rows = []
        # vLLM zeroes fresh blocks of hybrid models before use. Ours were allocated after it took
        # the list: left there, they would be zeroed in the next iteration, with K and V in them.
        fresh = self._scheduler._get_new_block_ids_to_zero()
        if fresh:
            output.new_block_ids_to_zero = (output.new_block_ids_to_zero or []) + fresh
        # Cascade attention would take a prefix that the requests share as one of our rows too.
        output.num_common_prefix_blocks = [0] * len(output.num_common_prefix_blocks)
        values = {name: getattr(output, name) for name in _FIELDS}
        return FinetuningSchedulerOutput(**values, finetuning=plan)

    def window(self, pack: Pack, sequence: Sequence, num_tokens: int) -> ForwardWindow:
        """The plan's entry for the next tokens of a sequence, once they are in the iteration."""
        assert sequence.request is not None
        row_id, start = sequence.request.request_id, sequence.done
        block_ids = self._manager.get_blocks(row_id).get_block_ids()[0]
        return ForwardWindow(pack.pack_id, row_id, start, start + num_tokens, block_ids)
