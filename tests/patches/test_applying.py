"""Patches: applied once, and refused where vLLM is another."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import utils

from flexllm_vllm.config import KEY, FinetuningConfig
from flexllm_vllm.patches import (
    access,
    cpu_attention_forward,
    cpu_attention_layout,
    cpu_compilation,
    cpu_experts,
    cpu_linear_weights,
    cpu_quantised_lora,
    endpoint_plugins,
    engine_core,
    require,
)


def test_a_missing_attribute_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"run_busy_loop.*0\.32"):
        require(SimpleNamespace(__name__="EngineCoreProc"), "run_busy_loop")


def test_patches_are_applied_once() -> None:
    from vllm.entrypoints.launchers import app
    from vllm.lora.layers import base_linear
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.engine.core import EngineCoreProc

    for patch, owner, name in (
        (cpu_linear_weights, utils, "dispatch_cpu_unquantized_gemm"),
        (cpu_attention_forward, cpu_attn.CPUAttentionBackendImpl, "forward"),
        (cpu_attention_layout, cpu_attn, "_get_attn_isa"),
        (cpu_experts, unquantized_fused_moe_method, "select_unquantized_moe_backend"),
        (cpu_quantised_lora, base_linear, "_get_lora_device"),
        (endpoint_plugins, app, "attach_endpoint_plugins"),
        (access, app, "init_entrypoints_middleware"),
        (engine_core, EngineCoreProc, "run_busy_loop"),
    ):
        patch.apply()
        once = getattr(owner, name)
        patch.apply()
        assert getattr(owner, name) is once


def test_bfloat16_with_amx_gets_a_layout_that_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import cpu_attn

    cpu_attention_layout.apply()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu_attn._get_attn_isa.__wrapped__(torch.bfloat16, 128, 64) == "amx"
    assert cpu_attn._get_attn_isa(torch.bfloat16, 128, 64) == "vec"


def test_a_linear_whose_weight_onednn_holds_is_on_the_cpu() -> None:
    from vllm.lora.layers import base_linear

    cpu_quantised_lora.apply()
    eight_bits = torch.nn.Module()
    eight_bits.weight = None
    assert base_linear._get_lora_device(eight_bits) == torch.device("cpu")
    assert base_linear._get_lora_device(torch.nn.Linear(2, 2, device="meta")).type == "meta"


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A Llama's configuration; no weights are needed to configure an engine."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    return tmp_path / "model"


def test_vllm_still_turns_compilation_off_for_lora(tiny_model: Path) -> None:
    """Fails once vLLM compiles LoRA on CPU by itself: then the patch may be needless."""
    from vllm.config import CompilationMode

    config = EngineArgs(model=str(tiny_model), enable_lora=True).create_engine_config()
    assert config.compilation_config.mode == CompilationMode.NONE


def test_a_finetuning_server_compiles(tiny_model: Path, tmp_path: Path) -> None:
    from vllm.config import CompilationMode

    cpu_compilation.apply_to_platform(lambda c: FinetuningConfig.from_vllm_config(c) is not None)
    finetuning = {KEY: FinetuningConfig(dir=tmp_path).to_dict()}
    args = EngineArgs(model=str(tiny_model), enable_lora=True, additional_config=finetuning)
    config = args.create_engine_config()
    assert config.compilation_config.mode != CompilationMode.NONE
    assert config.lora_config is not None
    eager = EngineArgs(
        model=str(tiny_model), enable_lora=True, additional_config=finetuning, enforce_eager=True
    ).create_engine_config()
    assert eager.compilation_config.mode == CompilationMode.NONE
