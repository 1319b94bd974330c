"""The weights that inference and the backward share."""

from typing import Any

import pytest
import torch

from flexllm_vllm.models.weights import FrozenWeights
from flexllm_vllm.patches import cpu_linear_weights


@pytest.mark.parametrize("form", ["plain", "packed for the backward", "one copy"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_same_products_whatever_the_form(
    form: str, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear_weights, "prefers_packed", lambda: form != "plain")
    torch.manual_seed(0)
    weight, x, dy = torch.randn(96, 64), torch.randn(7, 64), torch.randn(7, 96)
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = torch.randn(96) if has_bias else None
    cpu_linear_weights.apply(one_copy=form == "one copy")
    try:
        cpu_linear_weights._dispatch(layer, remove_weight=True)
    finally:
        cpu_linear_weights.apply()
    if form == "plain":
        assert torch.equal(layer.weight, weight)
    else:
        assert layer.weight.numel() == 0

    weights = FrozenWeights([{"qkv_proj": layer}])
    weights.check(torch.float32)
    bias = layer.bias if has_bias else torch.zeros(96)
    whole = x.double() @ weight.double().t() + bias.double()
    found = weights.project(0, "qkv_proj", x)
    torch.testing.assert_close(found.double(), whole, rtol=1e-5, atol=1e-5)
    some = weights.first_columns(0, "qkv_proj", x, 40)
    torch.testing.assert_close(some.double(), whole[:, :40], rtol=1e-5, atol=1e-5)
    assert some.is_contiguous()
    dx = weights.input_gradient(0, "qkv_proj", dy)
    expected = dy.double() @ weight.double()
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-5)
