"""Answers iterations as the worker process would, without a model."""

from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

from benchmarks.simulate.machine import Contents
from flexllm_vllm.plan import (
    AdapterLayout,
    BackwardWindow,
    OpenPack,
    PackResult,
    StepPlan,
    StepResult,
)


class FakeWorker:
    """Requests and packs as the worker tracks them; every token costs one nat of loss.

    Args:
        num_layers: decoder layers.
        loss_head_layers: cost of a token's loss head, in decoder layers.
        layout: what it answers to the start of an adapter.

    Attributes:
        packs: that are open, by id.
        trained: of each job, tokens run forward (a third each) and backward (two thirds).
        steps: optimizer steps of each job.
        num_dropped: packs that were given up.
    """

    def __init__(self, num_layers: int, loss_head_layers: float, layout: AdapterLayout) -> None:
        self.num_layers = num_layers
        self.packs: dict[int, OpenPack] = {}
        self.trained: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.num_dropped = 0
        self._loss_head_layers = loss_head_layers
        self._layout = layout
        # Tokens of each request that are known: prompt and answer.
        self._known: dict[str, int] = {}

    def run(self, output: Any) -> tuple[ModelRunnerOutput, Contents]:
        """What the model runner answers, and what the iteration held."""
        plan: StepPlan = getattr(output, "finetuning", None) or StepPlan()
        contents = Contents()
        for req_id in output.finished_req_ids:
            self._known.pop(req_id, None)
        result = self._run_plan(plan, contents)
        hidden = {window.row_id for window in plan.forward}
        req_ids = list(output.num_scheduled_tokens)
        sampled: dict[str, list[int]] = {}
        for new in output.scheduled_new_reqs:
            self._known[new.req_id] = len(new.prompt_token_ids)
            if new.req_id not in hidden:
                sampled[new.req_id] = self._advance(output, new.req_id, new.num_computed_tokens)
                contents.prefill_tokens += output.num_scheduled_tokens[new.req_id]
        cached = output.scheduled_cached_reqs
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if req_id in hidden:
                continue
            count = output.num_scheduled_tokens[req_id]
            sampled[req_id] = self._advance(output, req_id, computed)
            if count == 1 and sampled[req_id]:
                contents.decode_rows += 1
                contents.context += computed
            else:
                contents.prefill_tokens += count
        answer = ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: index for index, req_id in enumerate(req_ids)},
            sampled_token_ids=[sampled.get(req_id, []) for req_id in req_ids],
        )
        answer.finetuning = result
        return answer, contents

    def _advance(self, output: Any, req_id: str, computed: int) -> list[int]:
        """The token sampled for a request, a function of its position; none within a prompt."""
        known = self._known[req_id]
        if computed + output.num_scheduled_tokens[req_id] < known:
            return []
        self._known[req_id] = known + 1
        return [3 + known % 97]

    def _run_plan(self, plan: StepPlan, contents: Contents) -> StepResult:
        result = StepResult()
        for job_id in plan.end:
            self.packs = {i: p for i, p in self.packs.items() if p.job_id != job_id}
        for pack_id in plan.drop:
            self.num_dropped += 1
            self.packs.pop(pack_id, None)
        for start in plan.start:
            self.trained[start.job_id] = 0.0
            self.steps[start.job_id] = 0
            result.started[start.job_id] = self._layout
        for pack in plan.open:
            self.packs[pack.pack_id] = pack
        for window in plan.backward:
            for part in window.each_layer():
                self._backward(part, contents, result)
        for step in plan.optimize:
            self._optimize(step.job_id)
            contents.optimizer_steps += 1
            result.grad_norms[step.job_id] = 1.0
        result.saved = [save.path for save in plan.save]
        for forward in plan.forward:
            tokens = forward.end - forward.start
            contents.forward_tokens += tokens
            self.trained[self.packs[forward.pack_id].job_id] += tokens / 3
        return result

    def _backward(self, window: BackwardWindow, contents: Contents, result: StepResult) -> None:
        pack = self.packs[window.pack_id]
        layers = self._loss_head_layers if window.layer == self.num_layers else 1.0
        share = (window.end - window.start) * layers / self.num_layers
        contents.backward_tokens += share
        contents.backward_windows += 1
        self.trained[pack.job_id] += share * 2 / 3
        if window.layer == self.num_layers and window.start == 0:
            targets = (target for s in pack.sequences for target in s.targets)
            result.packs[window.pack_id] = PackResult(float(sum(t >= 0 for t in targets)))
        if window.layer == self._layout.lowest_layer and window.start == 0:
            self._commit(self.packs.pop(window.pack_id))

    def _commit(self, pack: OpenPack) -> None:
        """The gradients of a pack are complete."""

    def _optimize(self, job_id: str) -> None:
        self.steps[job_id] += 1
