"""Where vLLM's two model runners differ for finetuning: V1, and V2, its default on GPUs."""

import copy
from collections.abc import Callable
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from flexllm_vllm.worker.readings import PendingResult


def follow_batch_order(runner: Any) -> Callable[[], list[str]]:
    """What tells, within a forward, the requests of the batch in the order of their rows.

    V1 (``vllm/v1/worker/gpu_model_runner.py``) keeps its batch; V2
    (``vllm/v1/worker/gpu/model_runner.py``) makes a new one for each forward in ``prepare_inputs``.
    """
    if hasattr(runner, "input_batch"):
        return lambda: list(runner.input_batch.req_ids)
    order: list[str] = []
    prepare = runner.prepare_inputs

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        order[:] = batch.req_ids
        return batch

    runner.prepare_inputs = prepare_inputs
    return lambda: order


def with_result(output: Any, result: PendingResult) -> Any:
    """An output of a model runner with the result of its iteration's finetuning work.

    Where its tokens are still on their way from the device, so may be what is in the result.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return _AsyncOutputWithResult(output, result)
    # vLLM's empty output is one shared object.
    output = copy.copy(output)
    output.finetuning = result.get()
    return output


class _AsyncOutputWithResult(AsyncModelRunnerOutput):
    """An output whose tokens are still on their way from the device."""

    def __init__(self, output: AsyncModelRunnerOutput, result: PendingResult) -> None:
        self._output, self._result = output, result

    def get_output(self) -> ModelRunnerOutput:
        return with_result(self._output.get_output(), self._result)
