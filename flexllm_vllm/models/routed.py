"""A mixture of experts in place of a decoder layer's MLP (Mixtral, Qwen3-MoE): its gradient.

Adapters cover the attention alone, the experts and their router are frozen: what is needed is the
gradient of the block's input. A token's output is ``sum_k w_k E_k(x)`` over the experts that its
router chose, ``w`` a softmax of the router's logits; both are differentiated, as in
``transformers`` (``modeling_mixtral.py``, ``modeling_qwen3_moe.py``). Which experts were chosen is
asked of vLLM's own router again. Nothing within the block is kept: an expert's first product is
computed once more.
"""

from typing import Any

import torch

from flexllm_vllm.kernels.linear import input_gradient
from flexllm_vllm.models.expert_weights import ExpertWeights
from flexllm_vllm.models.gated import gated_activation_of
from flexllm_vllm.models.weights import unwrapped


def find_routed(layer: Any) -> Any:
    """vLLM's block of router and experts in a decoder layer; None where it has an MLP."""
    block = getattr(layer, "block_sparse_moe", None) or layer.mlp
    return block if hasattr(block, "experts") else None


class RoutedExperts:
    """The block of router and experts of one decoder layer.

    Args:
        block: vLLM's (``MixtralMoE``, ``Qwen3MoeSparseMoeBlock``).

    Attributes:
        activation: of the experts.
        intermediate_size: their width on this rank, before the activation twice that.

    Raises:
        ValueError: it routes or computes otherwise than what is covered here.
    """

    def __init__(self, block: Any) -> None:
        self._gate = unwrapped(block.gate)
        runner = unwrapped(block.experts)
        self._router = runner.router
        self._renormalises = bool(getattr(self._router, "renormalize", True))
        self._check(runner)
        self.activation = gated_activation_of(str(runner.routed_experts.activation.value))
        self._weights = ExpertWeights(runner.routed_experts, self.activation)
        self.intermediate_size = self._weights.intermediate_size

    def _check(self, runner: Any) -> None:
        """The attributes are those of vLLM's routers, of which each has some."""
        experts = runner.routed_experts
        of_router = {
            "use_grouped_topk": "groups of experts",
            "num_expert_group": "groups of experts",
            "e_score_correction_bias": "a correction of the router's scores",
            "custom_routing_function": "a routing function of its own",
            "eplb_state": "expert load balancing",
        }
        unsupported = []
        for name, what in of_router.items():
            value = getattr(self._router, name, None)
            if value is not None and value is not False:
                unsupported.append(what)
        if getattr(self._router, "scoring_func", "softmax") != "softmax":
            unsupported.append("a router that scores by other than a softmax")
        if getattr(self._router, "routed_scaling_factor", 1.0) != 1.0:
            unsupported.append("scaled routing weights")
        if experts.apply_router_weight_on_input:
            unsupported.append("routing weights that scale an expert's input")
        if getattr(runner, "_shared_experts", None) is not None:
            unsupported.append("shared experts")
        if runner.moe_config.moe_parallel_config.use_ep:
            unsupported.append("--enable-expert-parallel")
        if unsupported:
            raise ValueError(
                f"finetuning does not support a mixture of experts with {unsupported[0]} yet"
            )

    def backward(self, dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the block's input, and of the router's logits, which has its own.

        Over several ranks each has a part of both, as it has a part of every expert.

        Args:
            dy: ``[num_rows, hidden_size]``, in the dtype of the activations.
            x: like ``dy``, the block's input.

        Returns:
            ``[num_rows, hidden_size]`` float32 through the experts alone, and
            ``[num_rows, num_experts]`` float32.
        """
        logits = self._gate(x)[0].float()
        weights, chosen = self._router.select_experts(hidden_states=x, router_logits=logits)
        chosen = chosen.long()
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        d_weights = torch.zeros_like(weights)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            dx_of, d_weight = self._expert_backward(
                expert, dy[rows], x[rows], weights[rows, places].unsqueeze(1)
            )
            dx.index_add_(0, rows, dx_of)
            d_weights[rows, places] = d_weight
        return dx, self._routing_backward(d_weights, weights, chosen, logits)

    def _expert_backward(
        self, expert: int, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, down = self._weights.of(expert)
        d_product = input_gradient(dy, down)
        d_gate_up, product = self.activation.backward(
            (d_product * weight).to(x.dtype), torch.nn.functional.linear(x, gate_up)
        )
        dx = input_gradient(d_gate_up, gate_up)
        return dx.float(), (d_product.float() * product.float()).sum(1)

    def _routing_backward(
        self,
        d_weights: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        logits: torch.Tensor,
    ) -> torch.Tensor:
        """Of weights that are a softmax of the chosen experts' logits, or that part of a softmax
        of all."""
        inner = (d_weights * weights).sum(1, keepdim=True)
        own = weights * d_weights
        if self._renormalises:
            return torch.zeros_like(logits).scatter_(1, chosen, own - weights * inner)
        return (-inner * logits.softmax(1)).scatter_add_(1, chosen, own)
