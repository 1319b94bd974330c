"""Batches whose activations are captured run the model's layers themselves.

A CUDA graph, or the graph of torch.compile, replays what it was made of: what is asked of the
layers later, such as to keep their inputs, it does not do. Why a patch: a batch's requests cannot
ask for it; vLLM has the switches (``force_eager``, ``need_eager``,
``ForwardContext.skip_compiled``) for uses of its own.
Fits vLLM 0.32 (``vllm/v1/worker/gpu_model_runner.py``, ``vllm/v1/worker/gpu/model_runner.py``).
Applied to the runner of a worker that finetunes; raises there if a switch is gone.
"""

from collections.abc import Callable
from typing import Any

import torch

from flexllm_vllm.patches import require


def apply(
    runner: Any,
    model: torch.nn.Module,
    needs_eager: Callable[[], bool],
    select_graph: Callable[[bool], object] | None = None,
) -> None:
    """Has each forward choose between graphs, compiled or captured, and the layers themselves.

    Both runners choose a CUDA graph before they prepare a batch; the compiled graph is chosen when
    the model is called.

    Args:
        runner: vLLM's model runner.
        model: vLLM's model.
        needs_eager: whether the batch that is about to run must run layer by layer.
        select_graph: where there is a compiled graph for such batches too, what selects it (given
            True) or the usual one; then none runs layer by layer.
    """

    from vllm.forward_context import get_forward_context

    def choose(*_: Any) -> None:
        if select_graph is None:
            get_forward_context().skip_compiled = needs_eager()
        else:
            select_graph(needs_eager())

    model.register_forward_pre_hook(choose)
    if hasattr(runner, "input_batch"):
        dispatch = require(runner, "_determine_batch_execution_and_padding")

        def dispatch_v1(*args: Any, **kwargs: Any) -> Any:
            if needs_eager():
                kwargs["force_eager"] = True
            return dispatch(*args, **kwargs)

        runner._determine_batch_execution_and_padding = dispatch_v1
        return
    from vllm.v1.worker.gpu import model_runner

    dispatch_graph = require(model_runner, "dispatch_cg_and_sync_dp")

    def dispatch_v2(*args: Any, **kwargs: Any) -> Any:
        if needs_eager():
            kwargs["need_eager"] = True
        return dispatch_graph(*args, **kwargs)

    model_runner.dispatch_cg_and_sync_dp = dispatch_v2
