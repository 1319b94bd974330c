"""What is accepted of quantised linears. The real kernel is in ``tests/engine``."""

from typing import Any

import pytest
import torch

from flexllm_vllm.models.quantised import check_quantised, dequantised, is_quantised


class Method:
    """Multiplies by a weight, its inputs rounded to 8 bits: by a scale of each row, or by one."""

    def __init__(self, scale: float | None = None) -> None:
        self.scale = scale

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        largest = x.abs().amax(1, keepdim=True).clamp(min=1e-6)
        scale = largest / 127 if self.scale is None else torch.tensor(self.scale)
        return (x / scale).round().clamp(-128, 127) * scale @ layer.rounded.t()


def layer(method: Any, size: int = 1100) -> Any:
    module: Any = torch.nn.Module()
    module.quant_method = method
    module.register_parameter("rounded", torch.nn.Parameter(torch.randn(24, size)))
    module.input_size_per_partition, module.params_dtype = size, torch.float32
    return module


@torch.no_grad()
def test_the_weight_is_what_the_forward_multiplies_by() -> None:
    module = layer(Method())
    assert is_quantised(module)
    check_quantised(module, torch.float32, "layer 0 o_proj")
    torch.testing.assert_close(dequantised(module), module.rounded.data)


@torch.no_grad()
def test_one_scale_for_all_inputs_is_that_of_the_layer() -> None:
    module = layer(Method(scale=0.3))
    module.input_scale = torch.tensor([0.3])
    check_quantised(module, torch.float32, "layer 0 o_proj")
    torch.testing.assert_close(dequantised(module), module.rounded.data)


@torch.no_grad()
def test_one_scale_for_all_inputs_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantisation Method of layer 0 o_proj.*cannot be told"):
        check_quantised(layer(Method(scale=0.3)), torch.float32, "layer 0 o_proj")


@torch.no_grad()
def test_a_kernel_that_fails_is_refused_by_name() -> None:
    class Broken:
        def apply(self, *_: Any) -> torch.Tensor:
            raise RuntimeError("no such kernel")

    with pytest.raises(ValueError, match="quantisation Broken of layer 3 qkv_proj: no such kernel"):
        check_quantised(layer(Broken()), torch.float32, "layer 3 qkv_proj")
