"""Patches: applied once, and refused where vLLM is another."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers import utils

from flexllm_vllm.patches import (
    cpu_attention_layout,
    cpu_linear_weights,
    endpoint_plugins,
    engine_core,
    require,
)


def test_a_missing_attribute_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"run_busy_loop.*0\.32"):
        require(SimpleNamespace(__name__="EngineCoreProc"), "run_busy_loop")


def test_patches_are_applied_once() -> None:
    from vllm.entrypoints.launchers import app
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.engine.core import EngineCoreProc

    for patch, owner, name in (
        (cpu_linear_weights, utils, "dispatch_cpu_unquantized_gemm"),
        (cpu_attention_layout, cpu_attn, "_get_attn_isa"),
        (endpoint_plugins, app, "attach_endpoint_plugins"),
        (engine_core, EngineCoreProc, "run_busy_loop"),
    ):
        patch.apply()
        once = getattr(owner, name)
        patch.apply()
        assert getattr(owner, name) is once


def test_the_plain_weight_stays_beside_the_packed_one() -> None:
    cpu_linear_weights.apply()
    layer = torch.nn.Linear(64, 96, bias=False).requires_grad_(False)
    weight = layer.weight.clone()
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert torch.equal(layer.weight, weight)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ weight.t())


def test_bfloat16_with_amx_gets_a_layout_that_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import cpu_attn

    cpu_attention_layout.apply()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu_attn._get_attn_isa.__wrapped__(torch.bfloat16, 128, 64) == "amx"
    assert cpu_attn._get_attn_isa(torch.bfloat16, 128, 64) == "vec"
