"""Whether an adapter fits onto a base model, by its settings and the header of its weights."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexllm_vllm.adapter_files.base_linears import BaseLinears
from flexllm_vllm.adapter_files.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, read_config
from flexllm_vllm.adapter_files.errors import AdapterFileError
from flexllm_vllm.adapter_files.safetensors_header import TensorInfo, read_header

# A module's path in the model, without PEFT's prefix: (layer, path within the layer).
_MODULE = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(\w+\.\w+)", re.ASCII)
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight", re.ASCII)


def check_adapter(folder: Path, base: BaseLinears, max_rank: int) -> AdapterConfig:
    """Refuse an adapter that vLLM could not serve on this model.

    Raises:
        AdapterFileError: says which setting or tensor is at fault.
    """
    config = read_config(folder)
    if config.max_rank > max_rank:
        raise AdapterFileError(
            f"{CONFIG_FILE}: the rank is {config.max_rank}, this server's maximum is {max_rank} "
            "(--finetuning-max-lora-rank)"
        )
    tensors = read_header(folder / WEIGHTS_FILE)
    if not tensors:
        raise AdapterFileError(f"{WEIGHTS_FILE} holds no tensors")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, config, base)
    for name in tensors:
        a, b = ".lora_A.weight", ".lora_B.weight"
        other = name.removesuffix(a) + b if name.endswith(a) else name.removesuffix(b) + a
        if other not in tensors:
            raise AdapterFileError(f"tensor '{name}' lacks its counterpart '{other}'")
    return config


def module_paths(tensors: Iterable[str]) -> list[str]:
    """Paths of the modules that these tensors of an adapter belong to, in order, once each."""
    matches = (_TENSOR.fullmatch(name) for name in tensors)
    return list(dict.fromkeys(match[1] for match in matches if match))


def canonical_targets(modules: Iterable[str], num_layers: int) -> dict[str, Any]:
    """``target_modules`` and ``layers_to_transform`` of ``peft.LoraConfig`` that name exactly these
    modules: names and layers where each layer has the same ones, else whole paths."""
    modules = sorted(modules)
    by_layer: dict[int, set[str]] = {}
    for module in modules:
        match = _MODULE.fullmatch(module)
        if match is None:
            return {"target_modules": modules, "layers_to_transform": None}
        by_layer.setdefault(int(match[1]), set()).add(match[2].split(".")[1])
    names = next(iter(by_layer.values()))
    if any(other != names for other in by_layer.values()):
        return {"target_modules": modules, "layers_to_transform": None}
    layers = None if len(by_layer) == num_layers else sorted(by_layer)
    return {"target_modules": sorted(names), "layers_to_transform": layers}


def name_targets(folder: Path, config: AdapterConfig, base: BaseLinears) -> None:
    """Rewrite a config whose ``target_modules`` are a pattern: as the names that it has matched."""
    if config.target_modules is not None:
        return
    modules = module_paths(read_header(folder / WEIGHTS_FILE))
    targets = canonical_targets(modules, base.num_layers)
    values = {**config.values, **targets, "exclude_modules": None, "layers_pattern": None}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2))


def _check_tensor(name: str, tensor: TensorInfo, config: AdapterConfig, base: BaseLinears) -> None:
    where = f"tensor '{name[:200]}'"
    match = _TENSOR.fullmatch(name)
    module = match and _MODULE.fullmatch(match[1])
    if not match or not module:
        raise AdapterFileError(f"{where} is no LoRA matrix of a decoder layer")
    layer, path = int(module[1]), module[2]
    if layer >= base.num_layers:
        last = base.num_layers - 1
        raise AdapterFileError(f"{where}: the last layer of this model is {last}")
    linear = base.linears.get(path.split(".")[1])
    if linear is None or linear.path != path:
        names = ", ".join(base.linears)
        raise AdapterFileError(f"{where}: adapters are served on {names} only")
    if not config.targets(match[1], layer):
        raise AdapterFileError(f"{where} is on a module that {CONFIG_FILE} does not target")
    r = config.rank_of(match[1])
    expected = (r, linear.in_features) if match[2] == "A" else (linear.out_features, r)
    if tensor.shape != expected:
        raise AdapterFileError(
            f"{where} has the shape {list(tensor.shape)}, this model and rank {r} need "
            f"{list(expected)}"
        )
