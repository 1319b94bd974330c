"""A mixture of experts: its weights as vLLM's CPU kernel packs them, its gradient against autograd.

The whole model is in ``tests/engine/test_families.py``.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from flexllm_vllm.models.expert_weights import ExpertWeights, _of_tiles
from flexllm_vllm.models.gated import gated_activation_of
from flexllm_vllm.models.routed import RoutedExperts

HIDDEN, INNER, EXPERTS = 96, 64, 5


class UnquantizedFusedMoEMethod:
    """vLLM's, as far as it is asked: its CPU kernel on packed weights."""

    def __init__(self, isa: str = "vec") -> None:
        self.moe_kernel = SimpleNamespace(fused_experts=SimpleNamespace(isa=isa))

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor,
              *_: Any) -> torch.Tensor:  # fmt: skip
        out = torch.empty_like(x)
        packed = layer.w13_weight, layer.w2_weight
        ops.cpu_fused_moe(out, x, *packed, None, None, weights, ids, "silu", "vec")
        return out


def experts(gate_up: torch.Tensor, down: torch.Tensor, method: Any = None) -> Any:
    return SimpleNamespace(
        quant_method=method or UnquantizedFusedMoEMethod(),
        w13_weight=ops.cpu_prepack_moe_weight(gate_up, "vec"),
        w2_weight=ops.cpu_prepack_moe_weight(down, "vec"),
        activation=MoEActivation.SILU,
        apply_router_weight_on_input=False,
    )


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype) / HIDDEN**0.5
    return gate_up, torch.randn(EXPERTS, HIDDEN, INNER, dtype=dtype) / INNER**0.5


def block(gate: torch.Tensor, layer: Any, router: Any, **parallel: Any) -> Any:
    runner = SimpleNamespace(
        router=router,
        routed_experts=layer,
        moe_config=SimpleNamespace(
            moe_parallel_config=SimpleNamespace(**{"use_ep": False, **parallel})
        ),
    )
    return SimpleNamespace(gate=lambda x: (x @ gate.t(), None), experts=runner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_read_back(dtype: torch.dtype) -> None:
    gate_up, down = weights(dtype)
    found = ExpertWeights(experts(gate_up, down), gated_activation_of("silu"))
    assert found.intermediate_size == INNER
    for expert in range(EXPERTS):
        assert torch.equal(found.of(expert)[0], gate_up[expert])
        assert torch.equal(found.of(expert)[1], down[expert])


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="vLLM's other build has no AMX"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_are_those_of_amx(dtype: torch.dtype) -> None:
    gate_up, _ = weights(dtype)
    packed = ops.cpu_prepack_moe_weight(gate_up, "amx")
    assert torch.equal(_of_tiles(packed[2]), gate_up[2])


def test_another_layout_is_refused() -> None:
    unknown = UnquantizedFusedMoEMethod()
    del unknown.moe_kernel.fused_experts.isa
    with pytest.raises(ValueError, match="weights are packed for SimpleNamespace"):
        ExpertWeights(experts(*weights(), unknown), gated_activation_of("silu"))
    with pytest.raises(ValueError, match="packed for neon"):
        ExpertWeights(
            experts(*weights(), UnquantizedFusedMoEMethod("neon")), gated_activation_of("silu")
        )
    with pytest.raises(ValueError, match="quantisation object of experts"):
        ExpertWeights(experts(*weights(), object()), gated_activation_of("silu"))


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_gradient_is_that_of_autograd(renormalize: bool) -> None:
    gate_up, down = weights()
    gate = torch.randn(EXPERTS, HIDDEN) / 4
    router = CPURouter(3, EXPERTS, renormalize=renormalize)
    routed = RoutedExperts(block(gate, experts(gate_up, down), router))
    x, dy = torch.randn(17, HIDDEN), torch.randn(17, HIDDEN)
    dx, d_logits = routed.backward(dy, x)

    inputs = x.double().requires_grad_()
    logits = inputs @ gate.double().t()
    shares = logits.softmax(1)
    top, chosen = shares.topk(3, dim=1)
    if renormalize:
        top = top / top.sum(1, keepdim=True)
    y = torch.zeros(17, HIDDEN, dtype=torch.float64)
    for row in range(17):
        for share, expert in zip(top[row], chosen[row].tolist(), strict=True):
            g, u = (gate_up[expert].double() @ inputs[row]).chunk(2)
            product = torch.nn.functional.silu(g) * u
            y[row] += share * (down[expert].double() @ product)
    (expected,) = torch.autograd.grad(y, inputs, dy.double())
    found = dx.double() + d_logits.double() @ gate.double()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"scoring_func": "sigmoid"}, "other than a softmax"),
        ({"use_grouped_topk": True}, "groups of experts"),
        ({"routed_scaling_factor": 2.5}, "scaled routing weights"),
        ({"e_score_correction_bias": torch.zeros(EXPERTS)}, "correction of the router's scores"),
        ({"use_ep": True}, "--enable-expert-parallel"),
        ({"shared_experts": True}, "shared experts"),
    ],
)
def test_what_is_not_covered_is_refused(change: dict[str, Any], what: str) -> None:
    of_router = {k: v for k, v in change.items() if k not in ("use_ep", "shared_experts")}
    router = CPURouter(2, EXPERTS, **of_router)
    found = block(torch.zeros(EXPERTS, HIDDEN), experts(*weights()), router,
                  use_ep=change.get("use_ep", False))  # fmt: skip
    if "shared_experts" in change:
        found.experts._shared_experts = object()
    with pytest.raises(ValueError, match=what):
        RoutedExperts(found)
