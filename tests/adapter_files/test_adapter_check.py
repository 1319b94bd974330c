"""Whether an adapter fits onto the base model, by its settings and the header of its weights."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import TINY_LLAMA, logits, save_random_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flexllm_vllm.adapter_files.base_linears import base_linears
from flexllm_vllm.adapter_files.check import check_adapter, name_targets
from flexllm_vllm.adapter_files.config import read_config
from flexllm_vllm.adapter_files.errors import AdapterFileError
from flexllm_vllm.adapter_files.safetensors_header import read_header

BASE = base_linears(TINY_LLAMA)
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_random_adapter(tmp_path / "adapter")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "phi3", "granite", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"],
)
def test_the_shapes_are_those_of_the_model(family: str) -> None:
    values = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **values)
    model, base = AutoModelForCausalLM.from_config(config), base_linears(config)
    for path in base.paths():
        linear = base.linears[path.rsplit(".", 1)[1]]
        module = model.get_submodule(path)
        assert tuple(module.weight.shape) == (linear.out_features, linear.in_features)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == base.num_layers * len(base.linears)


@pytest.mark.parametrize("options", [
    {},
    {"use_rslora": True},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"model.layers.0.self_attn.v_proj": 3}},
    {"init_lora_weights": "gaussian"},
])  # fmt: skip
def test_what_peft_writes_is_accepted(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_random_adapter(tmp_path, **options)
    config = check_adapter(folder, BASE, 8)
    assert (config.r, config.max_rank) == (4, 8 if "rank_pattern" in options else 4)
    header = read_header(folder / "adapter_model.safetensors")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: info.shape for name, info in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accepted(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    check_adapter(folder, BASE, 8)


def test_a_pattern_of_targets_is_rewritten_as_names(tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path, target_modules=r".*layers\.1\..*\.(q|down)_proj")
    before = logits(folder)
    name_targets(folder, check_adapter(folder, BASE, 8), BASE)
    config = read_config(folder)
    assert (config.target_modules, config.layers_to_transform) == (("down_proj", "q_proj"), (1,))
    check_adapter(folder, BASE, 8)
    assert torch.equal(logits(folder), before)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"target_parameters": ["experts"]}, "target_parameters is set"),
        ({"something_new": {"a": 1}}, "something_new is set"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 9}, "the rank is 9, this server's maximum is 8"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"r": None}, "r is None"),
        ({"rank_pattern": {"q_proj": 100}}, "the rank is 100"),
        ({"rank_pattern": {"(a+)+$": 4}}, "only module paths"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern of 'q_proj' is 'x'"),
        ({"alpha_pattern": []}, "alpha_pattern must be an object"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": None}, "target_modules must be"),
        ({"target_modules": ["v_proj"]}, "module that adapter_config.json does not target"),
        ({"layers_to_transform": [1]}, "module that adapter_config.json does not target"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be"),
    ],
)
def test_a_setting_that_cannot_be_served_is_named(
    folder: Path, values: dict[str, Any], reason: str
) -> None:
    change_config(folder, **values)
    with pytest.raises(AdapterFileError, match=reason):
        check_adapter(folder, BASE, 8)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null", '"x"', "\ud800"])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        check_adapter(folder, BASE, 8)


def rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update({A: torch.zeros(4, 31)}), r"q_proj.lora_A.*\[4, 31\].*\[4, 32\]"),
        (lambda t: t.update({A: torch.zeros(5, 32)}), r"q_proj.lora_A.*\[5, 32\].*\[4, 32\]"),
        (lambda t: t.update({A: torch.zeros(4, 32, 1)}), r"\[4, 32, 1\]"),
        (lambda t: t.update({A: torch.zeros(4, 32, dtype=torch.float64)}), "dtype 'F64'"),
        (lambda t: t.update({A: torch.zeros(4, 32, dtype=torch.int8)}), "dtype 'I8'"),
        (lambda t: t.pop(A), "lacks its counterpart 'base_model.*q_proj.lora_A.weight'"),
        (lambda t: t.clear(), "holds no tensors"),
        (rename(A, A.replace("layers.0", "layers.2")), "last layer of this model is 1"),
        (rename(A, A.replace("layers.0", "layers.00")), "no LoRA matrix"),
        (rename(A, A.replace("self_attn", "mlp")), "served on q_proj, "),
        (rename(A, A.replace("q_proj", "x_proj")), "served on q_proj, "),
        (rename(A, "lm_head.lora_A.weight"), "'lm_head.lora_A.weight' is no LoRA matrix"),
        (rename(A, A.replace("lora_A", "lora_magnitude")), "no LoRA matrix"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: Change, reason: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(AdapterFileError, match=reason):
        check_adapter(folder, BASE, 8)


def one(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return json.dumps({"x": entry}).encode()


@pytest.mark.parametrize(
    ("length", "header", "data", "reason"),
    [
        (1 << 40, b"{}", 0, "header has 1099511627776 bytes"),
        (None, b"[]", 0, "no object"),
        (None, b"{", 0, "not valid JSON"),
        (None, b"[" * 200_000, 0, "not valid JSON"),
        (None, b'{"x": 1}', 0, "no dtype, shape"),
        (None, b'{"x": {}, "x": {}}', 0, "occurs twice"),
        (None, one(dtype=["F32"]), 8, "has the dtype"),
        (None, one(shape=[-2]), 8, "no valid shape"),
        (None, one(shape=[True, 2]), 8, "no valid shape"),
        (None, one(shape=[1 << 40] * 9), 8, "no valid shape"),
        (None, one(shape=[3]), 8, "has 8 bytes"),
        (None, one(data_offsets=[8, 0]), 8, "bytes"),
        (None, one(data_offsets=[4, 12]), 12, "overlap, or leave gaps"),
        (None, one(), 9, "the file holds 9"),
        (None, one(), 7, "the file holds 7"),
    ],
)
def test_a_malformed_header_is_refused(
    tmp_path: Path, length: int | None, header: bytes, data: int, reason: str
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    size = struct.pack("<Q", len(header) if length is None else length)
    path.write_bytes(size + header + bytes(data))
    with pytest.raises(AdapterFileError, match=reason):
        read_header(path)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # takes no space
    with pytest.raises(AdapterFileError, match="at most 16777216"):
        read_header(path)
    path.write_bytes(b"123")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        read_header(path)
