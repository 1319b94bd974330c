"""Quantised models: a random one's linears, rounded, as the tools of the field write them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE = 32
# AutoAWQ puts the columns of a word in this order.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# A linear's tensors in the file, by what follows its name, and its rounded weight.
Quantised = tuple[dict[str, torch.Tensor], torch.Tensor]


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Each row rounded to what 8-bit floats can express, by a scale of its own."""
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    return ((x / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def round_to_fp8(model: Path) -> None:
    """Gives a model's linears the weights that vLLM's ``fp8_per_channel`` makes of them."""
    file = model / "model.safetensors"
    weights = {
        name: to_fp8(x.bfloat16().float()) if name.endswith("_proj.weight") else x
        for name, x in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})


def compressed_tensors_model(model: Path, folder: Path) -> Path:
    """A model's linears in 4 bits, as llm-compressor writes them (``pack-quantized``)."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": GROUP_SIZE, "dynamic": False}  # fmt: skip
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }

    def quantise(weight: torch.Tensor) -> Quantised:
        numbers, scale, rounded = _symmetric(weight, torch.bfloat16)
        return {
            "weight_packed": _words(numbers + 8),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }, rounded

    return _write(model, folder, config, quantise)


def gptq_model(model: Path, folder: Path) -> Path:
    """A model's linears in 4 bits, as AutoGPTQ and GPTQModel write them (symmetric, v1)."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "desc_act": False,
              "sym": True, "lm_head": False}  # fmt: skip

    def quantise(weight: torch.Tensor) -> Quantised:
        numbers, scale, rounded = _symmetric(weight, torch.float16)
        size = weight.shape[1]
        # The zero point is 8, and the first version of the format stores one less.
        zeros = torch.full_like(scale, 7, dtype=torch.int64)
        return {
            "qweight": _words(numbers + 8).t().contiguous(),
            "qzeros": _words(zeros.t()),
            "scales": scale.t().contiguous(),
            "g_idx": (torch.arange(size) // GROUP_SIZE).to(torch.int32),
        }, rounded

    return _write(model, folder, config, quantise)


def awq_model(model: Path, folder: Path) -> Path:
    """A model's linears in 4 bits with zero points, as AutoAWQ writes them (``gemm``)."""
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True,
              "version": "gemm"}  # fmt: skip

    def quantise(weight: torch.Tensor) -> Quantised:
        groups = weight.view(len(weight), -1, GROUP_SIZE)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = _scale((high - low) / 15, torch.float16)
        zeros = (-low / scale.float()).round().clamp(0, 15)
        numbers = (groups / scale.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
        rounded = ((numbers - zeros[..., None]) * scale.float()[..., None]).view_as(weight)
        return {
            "qweight": _awq_words(numbers.view_as(weight).t()),
            "qzeros": _awq_words(zeros.t()),
            "scales": scale.t().contiguous(),
        }, rounded

    return _write(model, folder, config, quantise)


def _write(
    model: Path, folder: Path, config: dict[str, Any], quantise: Callable[[torch.Tensor], Quantised]
) -> Path:
    """A copy of a model with quantised linears; the model itself gets the rounded weights."""
    shutil.copytree(model, folder)
    plain = load_file(model / "model.safetensors")
    written = {}
    for name, weight in list(plain.items()):
        if not name.endswith("_proj.weight"):
            written[name] = weight
            continue
        tensors, plain[name] = quantise(weight)
        stem = name.removesuffix("weight")
        written |= {stem + suffix: x for suffix, x in tensors.items()}
    save_file(plain, model / "model.safetensors", {"format": "pt"})
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def _symmetric(
    weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers from -8 to 7, a scale for each row and group, and the weight that they make."""
    groups = weight.view(len(weight), -1, GROUP_SIZE)
    scale = _scale(groups.abs().amax(-1) / 7, dtype)
    numbers = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    rounded = (numbers * scale.float()[..., None]).view_as(weight)
    return numbers.view_as(weight), scale, rounded


def _scale(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One that the file's dtype and the server's both express."""
    return x.bfloat16().to(dtype)


def _words(numbers: torch.Tensor) -> torch.Tensor:
    """Eight numbers of a row in a word of 32 bits, whatever its sign, the first one lowest."""
    nibbles = numbers.to(torch.int64).reshape(len(numbers), -1, 8)
    return (nibbles << (4 * torch.arange(8))).sum(-1).to(torch.int32)


def _awq_words(numbers: torch.Tensor) -> torch.Tensor:
    rows, columns = numbers.shape
    return _words(numbers.reshape(rows, -1, 8)[..., list(AWQ_ORDER)].reshape(rows, columns))
