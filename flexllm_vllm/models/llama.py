"""Backward of Llama decoder layers, mirroring ``vllm/model_executor/models/llama.py``.

Kept per token and layer: the layer's input, the attention's output, and the merged gate/up
projection. Recomputed: both norms, q with its rotary embedding, the residual stream after the
attention, the SwiGLU product and the softmax rows. K and V are read from the paged cache.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import linear

from flexllm_vllm.kernels.cross_entropy import linear_cross_entropy
from flexllm_vllm.kernels.lora import lora_add, lora_backward
from flexllm_vllm.kernels.paged_attention import attention_backward, read_paged_kv
from flexllm_vllm.kernels.rms_norm import rms_norm, rms_norm_backward
from flexllm_vllm.kernels.rotary import apply_rotary
from flexllm_vllm.kernels.swiglu import swiglu, swiglu_backward
from flexllm_vllm.models.base import Capture, LinearShape, LoraMatrices, RowSegment


def _unwrapped(module: Any) -> Any:
    """The plain layer below vLLM's LoRA wrapper."""
    return getattr(module, "base_layer", module)


class LlamaBackward:
    """See :class:`flexllm_vllm.models.base.ModelBackward`."""

    def __init__(self, model: Any) -> None:
        self._decoder = model.model
        self._layers = list(model.model.layers)
        self._logit_scale = float(getattr(_unwrapped(model.logits_processor), "scale", 1.0))
        attention = self._layers[0].self_attn
        self.num_layers = len(self._layers)
        self.num_heads = attention.num_heads
        self.num_kv_heads = attention.num_kv_heads
        self.head_size = attention.head_dim
        self._q_size = attention.q_size
        self._kv_size = attention.kv_size
        self._scale = attention.scaling
        self._rotary = attention.rotary_emb
        norm_weight = self._layers[0].input_layernorm.weight
        self.hidden_size = norm_weight.shape[0]
        self.dtype = norm_weight.dtype
        config = model.config
        self._lm_head = _unwrapped(model.lm_head).weight[: config.vocab_size]
        self._check(model)
        down = _unwrapped(self._layers[0].mlp.down_proj)
        self._intermediate_size = down.weight.shape[1]
        self.saved: Mapping[str, int] = {
            "hidden": self.hidden_size,
            "attention": self._q_size,
            "gate_up": 2 * self._intermediate_size,
        }

    def _check(self, model: Any) -> None:
        """Refuses what this backward does not cover, rather than train with wrong gradients."""
        for index, layer in enumerate(self._layers):
            for name, module in self._linears(index).items():
                weight = getattr(_unwrapped(module), "weight", None)
                if weight is None or weight.dim() != 2 or weight.dtype != self.dtype:
                    raise ValueError(
                        f"finetuning needs plain {self.dtype} weights; layer {index} {name} is "
                        "quantised or was repacked without keeping its weight"
                    )
            if getattr(layer.self_attn.attn, "sliding_window", None) is not None:
                raise ValueError("finetuning does not support sliding-window attention yet")
        rotary = type(self._rotary).__name__
        if not hasattr(self._rotary, "cos_sin_cache"):
            raise ValueError(f"finetuning does not support the rotary embedding {rotary}")

    def _linears(self, layer: int) -> dict[str, Any]:
        module = self._layers[layer]
        return {
            "qkv_proj": module.self_attn.qkv_proj,
            "o_proj": module.self_attn.o_proj,
            "gate_up_proj": module.mlp.gate_up_proj,
            "down_proj": module.mlp.down_proj,
        }

    def linear_shapes(self) -> dict[str, LinearShape]:
        hidden, inner = self.hidden_size, self._intermediate_size
        return {
            "qkv_proj": LinearShape(hidden, (self._q_size, self._kv_size, self._kv_size)),
            "o_proj": LinearShape(self._q_size, (hidden,)),
            "gate_up_proj": LinearShape(hidden, (inner, inner)),
            "down_proj": LinearShape(inner, (hidden,)),
        }

    def module_path(self, layer: int, name: str) -> str:
        attention = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")
        parent = "self_attn" if name in attention else "mlp"
        return f"model.layers.{layer}.{parent}.{name}"

    def kv_cache(self, layer: int) -> torch.Tensor:
        return self._layers[layer].self_attn.attn.kv_cache

    def install_capture(self, capture: Capture) -> None:
        def on_layer(index: int) -> Any:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                _positions, hidden, residual = args[:3]
                capture(index, "hidden", hidden, residual)

            return hook

        def on_input(index: int, name: str) -> Any:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                capture(index, name, args[0], None)

            return hook

        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(on_layer(index))
            layer.self_attn.o_proj.register_forward_pre_hook(on_input(index, "attention"))
            layer.mlp.act_fn.register_forward_pre_hook(on_input(index, "gate_up"))

        def on_norm(_: Any, args: tuple[Any, ...]) -> None:
            capture(self.num_layers, "hidden", args[0], args[1])

        self._decoder.norm.register_forward_pre_hook(on_norm)

    def loss_head(
        self, hidden: torch.Tensor, targets: torch.Tensor, scale: float
    ) -> tuple[float, torch.Tensor]:
        norm = self._decoder.norm
        x = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        loss, dx = linear_cross_entropy(x, self._lm_head, targets, scale, self._logit_scale)
        return loss, rms_norm_backward(dx, hidden, norm.weight, norm.variance_epsilon)

    def _project(
        self, layer: int, name: str, x: torch.Tensor, adapter: LoraMatrices, width: int | None
    ) -> torch.Tensor:
        """The first ``width`` columns of a merged linear's output, adapter included."""
        module = _unwrapped(self._linears(layer)[name])
        bias = module.bias if module.bias is None or width is None else module.bias[:width]
        weight = module.weight if width is None else module.weight[:width]
        y = linear(x, weight, bias)
        if (group := adapter.group(layer, name)) is not None:
            within = [c for c in group.columns if c[1] <= y.shape[1]]
            lora_add(y, x, group, within)
        return y

    def _project_backward(
        self,
        layer: int,
        name: str,
        dy: torch.Tensor,
        x: torch.Tensor,
        adapter: LoraMatrices,
        need_dx: bool = True,
    ) -> torch.Tensor:
        """Accumulates the adapter's gradients and returns ``dX = dY W + ...``."""
        dx = dy @ _unwrapped(self._linears(layer)[name]).weight if need_dx else None
        if (group := adapter.group(layer, name)) is not None:
            lora_backward(dy, x, group, adapter.grad(layer, name), dx)
        return dx if dx is not None else x

    def layer_backward(
        self,
        layer: int,
        d_out: torch.Tensor,
        saved: Mapping[str, torch.Tensor],
        positions: torch.Tensor,
        segments: list[RowSegment],
        adapter: LoraMatrices,
    ) -> torch.Tensor:
        module = self._layers[layer]
        hidden, attention, gate_up = saved["hidden"], saved["attention"], saved["gate_up"]
        num_rows = hidden.shape[0]

        # MLP. `middle` is the residual stream between attention and MLP.
        d_act = self._project_backward(
            layer, "down_proj", d_out.to(self.dtype), swiglu(gate_up), adapter
        )
        d_gate_up = swiglu_backward(d_act, gate_up)
        middle = self._project(layer, "o_proj", attention, adapter, None).add_(hidden)
        norm = module.post_attention_layernorm
        normed = rms_norm(middle, norm.weight, norm.variance_epsilon)
        d_normed = self._project_backward(layer, "gate_up_proj", d_gate_up, normed, adapter)
        d_middle = rms_norm_backward(d_normed, middle, norm.weight, norm.variance_epsilon)
        d_middle += d_out

        # Attention.
        d_attention = self._project_backward(
            layer, "o_proj", d_middle.to(self.dtype), attention, adapter
        )
        if layer == 0 and adapter.group(0, "qkv_proj") is None:
            return d_middle
        norm = module.input_layernorm
        normed = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        cos, sin = self._rotary.cos_sin_cache.index_select(0, positions).chunk(2, dim=-1)
        neox = self._rotary.is_neox_style
        heads = (num_rows, self.num_heads, self.head_size)
        kv_heads = (num_rows, self.num_kv_heads, self.head_size)
        query = apply_rotary(
            self._project(layer, "qkv_proj", normed, adapter, self._q_size).view(heads),
            cos,
            sin,
            neox,
        )
        dq = torch.empty(heads, dtype=self.dtype)
        dk = torch.empty(kv_heads, dtype=self.dtype)
        d_qkv = torch.empty(num_rows, self._q_size + 2 * self._kv_size, dtype=self.dtype)
        cache = self.kv_cache(layer)
        for segment in segments:
            rows = segment.rows
            end = segment.start + rows.stop - rows.start
            key_t, value = read_paged_kv(cache, segment.block_ids, end)
            dq[rows] = attention_backward(
                d_attention.view(heads)[rows],
                attention.view(heads)[rows],
                query[rows],
                key_t,
                value,
                segment.start,
                self._scale,
                segment.dk,
                segment.dv,
            )
            # All later queries have had their turn: the gradients of these K and V are complete.
            own = slice(segment.start, end)
            dk[rows] = segment.dk[:, own].transpose(0, 1).to(self.dtype)
            d_qkv[rows, self._q_size + self._kv_size :] = (
                segment.dv[:, own].transpose(0, 1).reshape(end - segment.start, -1).to(self.dtype)
            )
        d_qkv[:, : self._q_size] = apply_rotary(dq, cos, -sin, neox).flatten(1)
        d_qkv[:, self._q_size : self._q_size + self._kv_size] = apply_rotary(
            dk, cos, -sin, neox
        ).flatten(1)
        d_normed = self._project_backward(
            layer, "qkv_proj", d_qkv, normed, adapter, need_dx=layer > 0
        )
        if layer == 0:
            return d_middle
        d_hidden = rms_norm_backward(d_normed, hidden, norm.weight, norm.variance_epsilon)
        return d_hidden.add_(d_middle)
