"""A worker without a model that remembers what lies in its memory, and checks every plan."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.outputs import ModelRunnerOutput

from benchmarks.simulate.machine import Contents
from benchmarks.simulate.worker import FakeWorker
from flexllm_vllm.plan import (
    AdapterLayout,
    BackwardWindow,
    ForwardWindow,
    OpenPack,
    StepPlan,
    StepResult,
)
from flexllm_vllm.worker.deadline import OptionalRunner


class CheckedWorker(FakeWorker):
    """Writes what a token is into its KV slot and its row of the activation cache, and reads it
    back where the model would: a block or page with two owners shows as foreign content.

    Args:
        num_layers, loss_head_layers, layout: as of :class:`FakeWorker`.
        num_blocks: KV blocks, the null block included.
        block_size: tokens of a KV block.
        clock: by which optional windows are ended.

    Attributes:
        examples: of each job, how often the gradient of each example (by its first target) was
            added.
        checkpoints: of each job, the steps whose weights were saved.
        num_cut: plans of which it had no time for all that was optional.
    """

    def __init__(
        self,
        num_layers: int,
        loss_head_layers: float,
        layout: AdapterLayout,
        num_blocks: int,
        block_size: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(num_layers, loss_head_layers, layout)
        self.examples: dict[str, Counter[int]] = {}
        self.checkpoints: dict[str, list[int]] = {}
        self.num_cut = 0
        self._optional = OptionalRunner(clock)
        self._block_size = block_size
        self._kv: list[list[Any]] = [[None] * block_size for _ in range(num_blocks)]
        self._activations: dict[tuple[int, int], Any] = {}
        self._tables: dict[str, list[int]] = {}
        self._prefixes: dict[str, list[int]] = {}  # of a request: hash of the tokens so far
        self._forwarded: dict[int, dict[str, int]] = {}
        self._at: dict[int, tuple[int, int]] = {}  # of a pack: layer, rows still to do
        self._gradients: dict[str, float] = {}

    def run(self, output: Any) -> tuple[ModelRunnerOutput, Contents]:
        plan: StepPlan = getattr(output, "finetuning", None) or StepPlan()
        for req_id in output.finished_req_ids:
            self._prefixes.pop(req_id, None)
        answer, contents = super().run(output)
        self._update_tables(output)
        rows = {window.row_id for window in plan.forward}
        cached = output.scheduled_cached_reqs
        requests = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        requests += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        requests = [(req_id, computed) for req_id, computed in requests if req_id not in rows]
        # A layer writes K and V of the whole batch before any row reads: a request may share blocks
        # that another fills in this iteration.
        for req_id, computed in requests:
            end = computed + output.num_scheduled_tokens[req_id]
            self._write(req_id, computed, self._prefixes[req_id][computed:end])
        for window in plan.forward:
            self._forward_window(window, output)
        for req_id, computed in requests:
            self._read(req_id, self._prefixes[req_id][:computed])
        for window in plan.forward:
            self._read(window.row_id, [(window.row_id, i) for i in range(window.end)])
        for req_id, tokens in zip(answer.req_ids, answer.sampled_token_ids, strict=True):
            if req_id not in rows:
                self._extend_prefix(req_id, tokens)
        self._run_optional(plan, answer.finetuning, contents)
        return answer, contents

    def _run_optional(self, plan: StepPlan, result: StepResult, contents: Contents) -> None:
        def run(window: BackwardWindow) -> bool:
            self._backward(window, contents, result)
            return True

        windows = [optional.window for optional in plan.optional]
        done, took_ms = self._optional.run(plan.optional, plan.deadline, run)
        result.optional, result.optional_ms = done, took_ms
        self.num_cut += done != windows

    @property
    def is_empty(self) -> bool:
        """It holds no pack and no row of the batch."""
        return not (self.packs or self._tables)

    # -- the model runner --------------------------------------------------------------------

    def _update_tables(self, output: Any) -> None:
        for req_id in output.finished_req_ids:
            self._tables.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            self._prefixes[new.req_id] = []
            self._extend_prefix(new.req_id, new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for req_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if req_id in cached.resumed_req_ids:
                self._tables[req_id] = []
            self._tables[req_id] += blocks[0] if blocks else []
        for req_id in output.num_scheduled_tokens:
            assert 0 not in self._tables[req_id], "the null block"

    def _extend_prefix(self, req_id: str, tokens: list[int]) -> None:
        prefix = self._prefixes[req_id]
        for token in tokens:
            prefix.append(hash((prefix[-1] if prefix else 0, token)))

    def _read(self, req_id: str, expected: list[Any]) -> None:
        table = self._tables[req_id]
        for position, value in enumerate(expected):
            block, offset = divmod(position, self._block_size)
            assert self._kv[table[block]][offset] == value, (req_id, position)

    def _write(self, req_id: str, start: int, values: list[Any]) -> None:
        table = self._tables[req_id]
        for position, value in enumerate(values, start):
            block, offset = divmod(position, self._block_size)
            self._kv[table[block]][offset] = value

    # -- finetuning --------------------------------------------------------------------------

    def _run_plan(self, plan: StepPlan, contents: Contents) -> StepResult:
        self._check_pages(plan)
        for start in plan.start:
            self.examples[start.job_id] = Counter()
            self._gradients[start.job_id] = 0.0
        opened = {pack.pack_id for pack in plan.open}
        assert not opened & self._at.keys(), "a pack id is used once"
        for pack in plan.open:
            assert len(pack.pages) == -(-pack.num_rows // self._layout.tokens_per_page)
            self._forwarded[pack.pack_id] = dict.fromkeys((s.row_id for s in pack.sequences), 0)
            self._at[pack.pack_id] = (self.num_layers, pack.num_rows)
        assert not opened & {window.pack_id for window in plan.backward}
        result = super()._run_plan(plan, contents)
        for save in plan.save:
            # Written before this plan's optimizer steps.
            steps = self.steps[save.job_id] - sum(x.job_id == save.job_id for x in plan.optimize)
            if save.state is not None:
                assert save.state["step"] == steps
                self.checkpoints.setdefault(save.job_id, []).append(steps)
        return result

    def _check_pages(self, plan: StepPlan) -> None:
        """No page had two owners. A pack given up while a plan was made may have left its pages to
        another of that plan; it is dropped with the next, which is this."""
        held = [
            page
            for pack in self.packs.values()
            if pack.pack_id not in plan.drop and pack.job_id not in plan.end
            for page in pack.pages
        ]
        assert len(held) == len(set(held))
        assert all(0 <= page < self._layout.num_pages for page in held)

    def _forward_window(self, window: ForwardWindow, output: Any) -> None:
        row_id, start, end = window.row_id, window.start, window.end
        assert output.num_scheduled_tokens[row_id] == end - start > 0
        pack, done = self.packs[window.pack_id], self._forwarded[window.pack_id]
        assert done[row_id] == start
        assert window.block_ids == self._tables[row_id]
        done[row_id] = end
        self._write(row_id, start, [(row_id, position) for position in range(start, end)])
        first = self._offset(pack, row_id)
        for position in range(start, end):
            self._activations[self._place(pack, first + position)] = (row_id, position)

    def _offset(self, pack: OpenPack, row_id: str) -> int:
        """First row of a sequence in its pack."""
        index = [s.row_id for s in pack.sequences].index(row_id)
        return sum(len(s.targets) for s in pack.sequences[:index])

    def _place(self, pack: OpenPack, row: int) -> tuple[int, int]:
        page, slot = divmod(row, self._layout.tokens_per_page)
        return pack.pages[page], slot

    def _backward(self, window: BackwardWindow, contents: Contents, result: StepResult) -> None:
        pack = self.packs[window.pack_id]
        assert (window.layer, window.end) == self._at[window.pack_id]
        assert 0 <= window.start < window.end
        row = 0
        for sequence in pack.sequences:
            rows = [(sequence.row_id, position) for position in range(len(sequence.targets))]
            assert self._forwarded[window.pack_id][sequence.row_id] == len(rows)
            self._read(sequence.row_id, rows)
            for value in rows:
                if window.start <= row < window.end:
                    assert self._activations[self._place(pack, row)] == value
                row += 1
        following = (window.layer, window.start)
        self._at[window.pack_id] = following if window.start else (window.layer - 1, row)
        super()._backward(window, contents, result)

    def _commit(self, pack: OpenPack) -> None:
        for sequence in pack.sequences:
            example = next(target for target in sequence.targets if target >= 0)
            self.examples[pack.job_id][example] += 1
            loss_tokens = sum(target >= 0 for target in sequence.targets)
            self._gradients[pack.job_id] += loss_tokens / pack.loss_denominator

    def _optimize(self, job_id: str) -> None:
        super()._optimize(job_id)
        assert self._gradients[job_id] == pytest.approx(1.0), "each token of the batch once"
        self._gradients[job_id] = 0.0
