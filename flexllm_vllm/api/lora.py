"""From the requested adapter to a complete one, and what an adapter to continue from must be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexllm_vllm.api.errors import ApiError, invalid
from flexllm_vllm.api.requests import Lora
from flexllm_vllm.jobs.types import ALL_TARGET_MODULES, LoraSpec

_SETTINGS = ("r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform")


def resolve_lora(
    wanted: Lora,
    max_lora_rank: int,
    allowed_modules: tuple[str, ...],
    num_layers: int,
    find_adapter: Callable[[str], str | None],
    where: str = "method.supervised.lora",
) -> tuple[LoraSpec, str | None]:
    """The adapter to train, and the PEFT folder to start from (None: a fresh adapter).

    An adapter that continues another has that one's shape: settings that are not given are taken
    from it.

    Raises:
        ApiError: above the server's limits, an unknown adapter, or another shape than it has.
    """
    given = {name: value for name in _SETTINGS if (value := getattr(wanted, name)) is not None}
    path: str | None = None
    if wanted.init_from is not None:
        path = find_adapter(wanted.init_from)
        if path is None:
            message = f"The adapter '{wanted.init_from[:200]}' does not exist"
            raise ApiError(404, message, f"{where}.init_from", "model_not_found")
        for name, value in _adapter_settings(
            wanted.init_from, Path(path), f"{where}.init_from"
        ).items():
            if _comparable(given.setdefault(name, value)) != _comparable(value):
                raise invalid(
                    f"{name} is {given[name]}, but '{wanted.init_from}' has {value}; leave it out",
                    f"{where}.{name}",
                )
    given.setdefault("target_modules", allowed_modules)
    refused = [name for name in given["target_modules"] if name not in allowed_modules]
    if refused:
        raise invalid(
            f"{', '.join(refused)} cannot be trained on this server; allowed: "
            f"{', '.join(allowed_modules)}",
            f"{where}.target_modules",
        )
    given["target_modules"] = tuple(given["target_modules"])
    layers = given.get("layers_to_transform") or ()
    if any(layer >= num_layers for layer in layers):
        raise invalid(
            f"the model has {num_layers} layers, 0 to {num_layers - 1}; there is no layer "
            f"{max(layers)}",
            f"{where}.layers_to_transform",
        )
    if "lora_alpha" in given and float(given["lora_alpha"]).is_integer():
        given["lora_alpha"] = int(given["lora_alpha"])  # as PEFT writes it
    spec = LoraSpec(**given, init_from=wanted.init_from)
    if spec.r > max_lora_rank:
        raise invalid(
            f"rank {spec.r} is above this server's maximum of {max_lora_rank} "
            "(--finetuning-max-lora-rank)",
            f"{where}.r",
        )
    return spec, path


def _adapter_settings(name: str, path: Path, where: str) -> dict[str, Any]:
    """The settings of a PEFT folder that training can continue."""
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        settings = {
            "r": int(config["r"]),
            "lora_alpha": config["lora_alpha"],
            "use_rslora": bool(config.get("use_rslora", False)),
            "target_modules": config["target_modules"],
            "layers_to_transform": _layers(config.get("layers_to_transform")),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"The adapter '{name}' has no readable adapter_config.json on this server"
        raise invalid(message, where) from error
    modules = settings["target_modules"]
    if not isinstance(modules, list) or not set(modules) <= set(ALL_TARGET_MODULES):
        message = (
            f"The adapter '{name}' has other target_modules than {', '.join(ALL_TARGET_MODULES)}"
        )
        raise invalid(message, where)
    for option in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(option):
            raise invalid(f"The adapter '{name}' uses {option}, which is not supported", where)
    if config.get("bias", "none") != "none":
        raise invalid(f"The adapter '{name}' trains biases, which is not supported", where)
    settings["target_modules"] = [module for module in ALL_TARGET_MODULES if module in modules]
    return settings


def _layers(value: Any) -> list[int] | None:
    """PEFT writes one layer as a number."""
    if value is None:
        return None
    return [int(value)] if isinstance(value, int) else sorted(int(layer) for layer in value)


def _comparable(value: Any) -> Any:
    return set(value) if isinstance(value, list | tuple) else value
