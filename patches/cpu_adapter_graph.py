"""A second compiled graph of the model, for batches with adapters or finetuning rows.

The model's first graph knows no adapter (``cpu_compilation.py``), and captures nothing. Run layer
by layer instead, a batch of a few rows takes half as long again: its norms, rotary embeddings and
activations are many small operations, each with its own way through Python. Here the same model is
compiled once more, with two operations that the compiler cannot look into: one adds the products of
the batch's adapters to a linear's output, the other hands activations to the finetuning.
Why a patch: vLLM compiles one graph of a model. The second one is made by vLLM's own compilation,
of a twin of the model that shares all of its modules, and is cached on disk as the first is.
Fits vLLM 0.32 (``vllm/compilation/decorators.py``). Needless once vLLM compiles LoRA on CPU with an
operation of its own that can be extended.
"""

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flexllm_vllm.patches import require

# (layer, name, x, addend): what is kept is ``x``, or ``x + addend``.
Capture = Callable[[int, str, torch.Tensor, "torch.Tensor | None"], None]

_is_traced = False
_modules: dict[str, Any] = {}
_capture: Capture | None = None


def is_traced() -> bool:
    """Whether the graph with adapters is the one that is being traced."""
    return _is_traced


def add_adapters(y: torch.Tensor, x: torch.Tensor, path: str) -> None:
    """Adds the adapters' products of a linear to its output ``y``."""
    module = _modules[path]
    module.punica_wrapper.add_lora_linear(
        y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, module.output_slices
    )


def add_embedding_adapters(y: torch.Tensor, ids: torch.Tensor, path: str) -> None:
    """Adds the adapters' products of the embedding to its output ``y``."""
    module = _modules[path]
    indices = module.punica_wrapper._embeddings_indices[: ids.shape[0]]
    shrunk = torch.nn.functional.embedding(ids + indices, module.lora_a_stacked_2d)
    module.punica_wrapper.add_lora_embedding(y, shrunk, module.lora_b_stacked, add_input=True)


def hand_over(x: torch.Tensor, addend: torch.Tensor | None, layer: int, name: str) -> None:
    """Hands activations to the finetuning."""
    if _capture is not None:
        _capture(layer, name, x, addend)


_LIBRARY = torch.library.Library("flexllm_vllm", "FRAGMENT")
# The capture changes nothing: said to change ``x``, it is neither dropped as an operation without a
# result nor moved behind what overwrites ``x``.
for _schema, _operation in (
    ("add_adapters(Tensor(a!) y, Tensor x, str path) -> ()", add_adapters),
    ("add_embedding_adapters(Tensor(a!) y, Tensor ids, str path) -> ()", add_embedding_adapters),
    ("capture(Tensor(a!) x, Tensor? addend, int layer, str name) -> ()", hand_over),
):
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], _operation, "CPU")
    _LIBRARY._register_fake(_schema.partition("(")[0], lambda *_: None)


class AdapterGraph:
    """The graph, and the choice between it and the one without adapters.

    Args:
        owner: the module that calls the compiled part of the model.
        name: the attribute of that part.
        twin: the same part, to be compiled with adapters.
    """

    def __init__(self, owner: torch.nn.Module, name: str, twin: torch.nn.Module) -> None:
        self._owner = owner
        self._name = name
        self._parts = {False: owner._modules[name], True: twin}

    def select(self, has_adapters: bool) -> None:
        """Chooses the graph of the next forward."""
        self._owner._modules[self._name] = self._parts[has_adapters]


def build(
    model: torch.nn.Module,
    linears: Mapping[str, Any],
    install_capture: Callable[[Capture], Callable[[], None]],
    capture: Capture,
    dummy_run: Callable[[], object],
) -> AdapterGraph | None:
    """Compiles the graph with adapters, or loads it from vLLM's cache.

    Args:
        model: vLLM's model, compiled by now.
        linears: the modules with adapters, by path: ``LoRAModelManager.modules``.
        install_capture: makes a forward call what it is given for all that may be kept.
        capture: called while the graph runs.
        dummy_run: runs the model on some rows.

    Returns:
        None where vLLM does not compile the model.
    """
    global _capture
    found = _compiled_part(model)
    if found is None:
        return None
    owner, name = found
    for path, module in linears.items():
        module.adapter_path = path
    _modules.update(linears)
    graph = AdapterGraph(owner, name, _twin(owner._modules[name]))
    graph.select(True)
    remove = install_capture(_traced_capture)
    try:
        with _tracing():
            dummy_run()
    finally:
        remove()
        graph.select(False)
    _capture = capture
    return graph


def _traced_capture(layer: int, name: str, x: torch.Tensor, addend: torch.Tensor | None) -> None:
    torch.ops.flexllm_vllm.capture(x, addend, layer, name)


@contextmanager
def _tracing() -> Iterator[None]:
    global _is_traced
    _is_traced = True
    try:
        yield
    finally:
        _is_traced = False


def _compiled_part(model: torch.nn.Module) -> tuple[torch.nn.Module, str] | None:
    """The module that vLLM compiles, as its owner and its name there."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    found = [
        (owner, name)
        for owner in model.modules()
        for name, part in owner.named_children()
        if isinstance(part, TorchCompileWithNoGuardsWrapper) and not part.do_not_compile
    ]
    return found[0] if len(found) == 1 else None


def _twin(part: Any) -> Any:
    """The same module once more, sharing all that it holds, for another compilation."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
    from vllm.config import set_current_vllm_config

    cls = type(part)
    forward = require(cls, "forward")
    # Another code object: compiled code is found by it, in memory, and by name and line on disk.
    other = types.FunctionType(
        forward.__code__.replace(co_name="forward_with_adapters"),
        forward.__globals__,
        "forward_with_adapters",
        forward.__defaults__,
        forward.__closure__,
    )
    other.__kwdefaults__ = forward.__kwdefaults__
    other.__annotations__ = forward.__annotations__
    other.__qualname__ = f"{cls.__qualname__}.forward_with_adapters"
    twin = copy.copy(part)
    twin.__class__ = type(f"{cls.__name__}WithAdapters", (cls,), {"forward": other})
    twin.__dict__.pop("aot_compiled_fn", None)
    twin.compiled = False
    twin.was_aot_compile_fn_loaded_from_disk = False
    with set_current_vllm_config(part.vllm_config):
        TorchCompileWithNoGuardsWrapper.__init__(twin, compile_prefix="", is_encoder=False)
    return twin
