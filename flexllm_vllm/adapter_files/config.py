"""``adapter_config.json``: what PEFT writes beside the weights, and what of it can be served."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flexllm_vllm.adapter_files.errors import AdapterFileError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

# Settings of ``peft.LoraConfig`` that say nothing about what the weights compute, or are checked
# one by one below.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Where the base weights are changed when such an adapter is loaded; the other names only say where
# training began.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# vLLM compiles the keys of patterns as regular expressions: only plain paths reach it.
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter that can be served.

    Attributes:
        target_modules: None where they are given as a pattern, which is not looked into.
        layers_to_transform: None for all.
        values: the whole file.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | None
    layers_to_transform: tuple[int, ...] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    values: dict[str, Any]

    @cached_property
    def max_rank(self) -> int:
        """The largest rank of a module."""
        return max([self.r, *self.rank_pattern.values()])

    def rank_of(self, module: str) -> int:
        """The rank of the module at this path, ``model.layers.0.self_attn.q_proj`` for one."""
        return _matching(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """What the product of its matrices is multiplied by."""
        rank = self.rank_of(module)
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, layer: int) -> bool:
        """Whether PEFT puts matrices on the module at this path, in this decoder layer."""
        if self.layers_to_transform is not None and layer not in self.layers_to_transform:
            return False
        return self.target_modules is None or any(
            module == target or module.endswith(f".{target}") for target in self.target_modules
        )


def read_config(folder: Path) -> AdapterConfig:
    """The settings in a PEFT folder.

    Raises:
        AdapterFileError: they are malformed, or such an adapter cannot be served.
        OSError: there is no such file.
    """
    path = folder / CONFIG_FILE
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise _wrong(f"is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _wrong(f"is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise _wrong("is no JSON object")
    return _check(values)


def _check(values: dict[str, Any]) -> AdapterConfig:
    if values.get("peft_type") != "LORA":
        raise _wrong(f"peft_type is {_short(values.get('peft_type'))}, must be 'LORA'")
    if values.get("bias", "none") != "none":
        raise _wrong("bias must be 'none': vLLM serves no biases of adapters")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise _wrong(
            f"init_lora_weights is {_short(start)}, which changes the base model; convert it to a "
            "plain LoRA adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for name, value in values.items():
        if value and name not in _KNOWN:
            raise _wrong(f"{name[:80]} is set, which vLLM does not serve")
    r = _rank(values.get("r"), "r")
    return AdapterConfig(
        r=r,
        lora_alpha=_number(values.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(values.get("use_rslora", False), "use_rslora"),
        target_modules=_modules(values.get("target_modules")),
        layers_to_transform=_layers(values.get("layers_to_transform")),
        rank_pattern={
            key: _rank(value, f"rank_pattern of '{key}'")
            for key, value in _pattern(values.get("rank_pattern"), "rank_pattern").items()
        },
        alpha_pattern={
            key: _number(value, f"alpha_pattern of '{key}'")
            for key, value in _pattern(values.get("alpha_pattern"), "alpha_pattern").items()
        },
        values=values,
    )


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 16:
        raise _wrong(f"{name} is {_short(value)}, must be a positive integer")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e9:  # not NaN either
        raise _wrong(f"{name} is {_short(value)}, must be a number")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise _wrong(f"{name} is {_short(value)}, must be true or false")
    return value


def _modules(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str) and value:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        raise _wrong("target_modules must be a list of module names")
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:  # PEFT takes an empty list for all layers
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _wrong("layers_to_transform must be a layer or a list of layers")
    return tuple(layers)


def _pattern(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(f"{name} must be an object")
    for key in value:
        if not _PATH.fullmatch(key):
            raise _wrong(f"{name} has the key {_short(key)}; only module paths are allowed")
    return value


def _matching(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """As ``peft.utils.get_pattern_key``: the first key that ends the path."""
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _short(value: Any) -> str:
    return repr(value)[:80]


def _wrong(what: str) -> AdapterFileError:
    return AdapterFileError(f"{CONFIG_FILE}: {what}")
