"""Where the time of a training step goes, by operation; the functions run in the worker process.

Plain timers around the package's own operations: torch's profiler adds a third to a step, most of
it to operations it does not know.
"""

import importlib
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

PACKAGE = "flexllm_vllm"

# Operations: the module of flexllm_vllm.models that calls them, and what the report calls them.
BACKWARD = {
    ("llama", "lora_backward"): "backward: LoRA gradients",
    ("llama", "linear_cross_entropy"): "loss head, forward and backward",
    ("norm", "rms_norm_backward"): "backward: norms",
    ("norm", "rms_norm"): "recomputed: norms",
    ("chain", "attention_forward"): "recomputed: attention",
    ("chain", "lora_add"): "recomputed: LoRA",
    ("rotary", "apply_rotary"): "rotary",
}


def on_worker_start_profile(worker: Any) -> None:
    """Times every operation from now on."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from flexllm_vllm.models.weights import FrozenWeights
    from flexllm_vllm.worker.activation_cache import ActivationCache
    from flexllm_vllm.worker.lora_slots import TrainingSlots
    from flexllm_vllm.worker.trainer import Trainer

    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def timed(owner: Any, name: str, label: str, gflop: Any = None) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            spent[label][0] += time.perf_counter() - start
            if gflop is not None:
                spent[label][1] += gflop(*args, result) / 1e9
            return result

        setattr(owner, name, outer)

    def product(x: torch.Tensor, *rest: Any) -> float:
        return 2.0 * x.numel() * rest[-1].shape[-1]

    def head(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> float:
        return 4.0 * x.numel() * weight.shape[0]

    flop = {"linear_cross_entropy": head}
    for (module, name), label in BACKWARD.items():
        timed(importlib.import_module(f"{PACKAGE}.models.{module}"), name, label, flop.get(name))
    timed(worker._trainer.model, "_attention", "backward: attention")
    decoder = worker._trainer.model._decoder
    activation = SimpleNamespace(**vars(decoder.activation))
    timed(activation, "backward", "backward: activation")
    decoder.activation = activation
    timed(FrozenWeights, "project", "recomputed: gate/up projection",
          lambda _, layer, name, x, y: 2.0 * x.numel() * y.shape[-1])  # fmt: skip
    timed(FrozenWeights, "input_gradient", "backward: dX = dY W",
          lambda _, layer, name, dy, dx: 2.0 * dy.numel() * dx.shape[-1])  # fmt: skip
    timed(FrozenWeights, "first_columns", "recomputed: query projection",
          lambda _, layer, name, x, width, y: 2.0 * x.numel() * y.shape[-1])  # fmt: skip
    timed(ActivationCache, "read", "activation cache: read")
    timed(ActivationCache, "write", "activation cache: write")
    timed(TrainingSlots, "write", "LoRA slot rewritten")
    timed(Trainer, "_optimize", "clipping, AdamW, and the slot")
    timed(Trainer, "run", "= backward and optimizer")
    timed(PunicaWrapperCPU, "add_lora_linear", "forward: LoRA")
    for layer in worker.model_runner.model.model.layers:
        for module in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj,
                       layer.mlp.down_proj):  # fmt: skip
            timed(module, "apply", "forward: linear layers, LoRA included", product)
        timed(layer.self_attn.attn, "forward", "forward: attention")
    timed(worker.model_runner, "execute_model", "= forward")
    worker.profiled = (time.perf_counter(), spent)


def on_worker_end_profile(worker: Any) -> list[dict[str, Any]]:
    """Seconds and GFLOP by operation, longest first. The timers stay: profile last."""
    began, spent = worker.profiled
    rows = [
        {"operation": label, "seconds": seconds, "gflop": gflop}
        for label, (seconds, gflop) in spent.items()
    ]
    rows.append({"operation": "= all", "seconds": time.perf_counter() - began, "gflop": 0.0})
    return sorted(rows, key=lambda row: -row["seconds"])
