"""Backward of Llama decoder layers, mirroring ``vllm/model_executor/models/llama.py``.

A layer's forward is a chain, and any value of it can be kept or computed again from those before:

``hidden -> (norm, q) query -> (softmax K V) attention -> (o_proj) middle -> (norm) gate_up``

K and V are read from the paged cache; both norms, the SwiGLU product and the softmax rows are
always recomputed. Which of the chain's values are needed at all follows from the adapter's targets
(``LlamaBackward._needs``), which of those are kept from the policy (``LlamaBackward.saved``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from flexllm_vllm.kernels.cross_entropy import TokenLosses, linear_cross_entropy, release_buffers
from flexllm_vllm.kernels.linear import input_gradient, use_onednn
from flexllm_vllm.kernels.lora import lora_add, lora_backward
from flexllm_vllm.kernels.paged_attention import attention_backward, attention_forward
from flexllm_vllm.kernels.rms_norm import rms_norm, rms_norm_backward
from flexllm_vllm.kernels.rotary import apply_rotary
from flexllm_vllm.kernels.swiglu import swiglu, swiglu_backward
from flexllm_vllm.models.base import (
    ActivationPolicy,
    Capture,
    LinearShape,
    LoraMatrices,
    RowSegment,
    TrainedLinears,
)
from flexllm_vllm.models.weights import FrozenWeights, unwrapped


@dataclass(frozen=True)
class _Needs:
    """How far down a layer gradients must be carried.

    Attributes:
        gate_up: to the merged gate/up projection, through down_proj and SwiGLU.
        middle: to the residual stream between attention and MLP, through the second norm.
        attention: through the attention, to the layer's first norm.
        hidden: to the layer's input.
    """

    gate_up: bool
    middle: bool
    attention: bool
    hidden: bool


class LlamaBackward:
    """See :class:`flexllm_vllm.models.base.ModelBackward`."""

    def __init__(self, model: Any, max_jobs: int = 1) -> None:
        self._decoder = model.model
        self._layers = list(model.model.layers)
        self._logit_scale = float(getattr(unwrapped(model.logits_processor), "scale", 1.0))
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
        self._intermediate_size = unwrapped(self._layers[0].mlp.down_proj).input_size
        self._lm_head = unwrapped(model.lm_head)
        self._vocab_size = model.config.vocab_size
        self._weights = FrozenWeights(
            [
                {
                    "qkv_proj": layer.self_attn.qkv_proj,
                    "o_proj": layer.self_attn.o_proj,
                    "gate_up_proj": layer.mlp.gate_up_proj,
                    "down_proj": layer.mlp.down_proj,
                }
                for layer in self._layers
            ],
            num_kept=max_jobs,
        )
        self._check()

    def _check(self) -> None:
        """Refuses what this backward does not cover, rather than train with wrong gradients."""
        self._weights.check(self.dtype)
        if any(getattr(x.self_attn.attn, "sliding_window", None) is not None for x in self._layers):
            raise ValueError("finetuning does not support sliding-window attention yet")
        if not hasattr(self._rotary, "cos_sin_cache"):
            raise ValueError(
                f"finetuning does not support the rotary embedding {type(self._rotary).__name__}"
            )

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

    def rotary_table(self, positions: torch.Tensor) -> torch.Tensor:
        return self._rotary.cos_sin_cache.index_select(0, positions).float()

    def release(self) -> None:
        self._weights.forget()
        release_buffers()

    # -- what is kept ------------------------------------------------------------------------

    def _needs(self, layer: int, trained: TrainedLinears) -> _Needs:
        """All of a layer, but for the lowest with LoRA: there the gradient ends at the first."""
        above = layer > trained.lowest_layer
        qkv = above or (layer, "qkv_proj") in trained
        out = qkv or (layer, "o_proj") in trained
        gate_up = out or (layer, "gate_up_proj") in trained
        return _Needs(gate_up=gate_up, middle=out, attention=qkv, hidden=above)

    def saved(
        self, layer: int, policy: ActivationPolicy, trained: TrainedLinears
    ) -> dict[str, int]:
        """See :class:`flexllm_vllm.models.base.ModelBackward`.

        ``store`` keeps every value of the chain that is needed: no GEMM is run twice. ``balanced``
        keeps the input and the attention, and recomputes the query, output and gate/up
        projections. ``minimal`` keeps the first value that is needed.
        """
        if layer < trained.lowest_layer:
            return {}
        needs = self._needs(layer, trained)
        width = {
            "hidden": self.hidden_size,
            "query": self._q_size,
            "attention": self._q_size,
            "middle": self.hidden_size,
            "gate_up": 2 * self._intermediate_size,
        }
        trains_out = (layer, "o_proj") in trained
        # `attention` itself is only the input of o_proj's LoRA: its backward needs no output.
        wanted = []
        if policy == "store":
            wanted += ["hidden", "query"] if needs.attention else []
            wanted += ["attention"] if trains_out else []
            trains_gate_up = (layer, "gate_up_proj") in trained
            wanted += ["middle"] if needs.middle or trains_gate_up else []
            wanted += ["gate_up"]
        elif trains_out and policy == "balanced":
            wanted += ["hidden", "attention"]
        elif not (needs.attention or trains_out):
            wanted += ["middle"]
        else:
            wanted += ["hidden"] if policy == "minimal" else ["hidden", "middle"]
        return {name: width[name] for name in wanted}

    def install_capture(self, capture: Capture) -> Callable[[], None]:
        def on_stream(index: int, name: str, position: int) -> Any:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                capture(index, name, args[position], args[position + 1])

            return hook

        def on_input(index: int, name: str) -> Any:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                capture(index, name, args[0], None)

            return hook

        handles = [
            self._decoder.norm.register_forward_pre_hook(on_stream(self.num_layers, "hidden", 0))
        ]
        for index, layer in enumerate(self._layers):
            for module, hook in (
                (layer, on_stream(index, "hidden", 1)),
                (layer.self_attn.attn, on_input(index, "query")),
                (layer.self_attn.o_proj, on_input(index, "attention")),
                (layer.post_attention_layernorm, on_stream(index, "middle", 0)),
                (layer.mlp.act_fn, on_input(index, "gate_up")),
            ):
                handles.append(module.register_forward_pre_hook(hook))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    # -- the backward ------------------------------------------------------------------------

    def loss_head(
        self, hidden: torch.Tensor, targets: torch.Tensor, scale: float
    ) -> tuple[TokenLosses, torch.Tensor | None]:
        norm, head = self._decoder.norm, self._lm_head
        weight = head.weight[: self._vocab_size]
        packed = None
        if len(head.weight) == len(weight) and (weight.dtype != torch.float32 or use_onednn()):
            packed = getattr(head, "cpu_linear", None)
        x = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        losses, dx = linear_cross_entropy(
            x,
            weight,
            targets,
            scale,
            self._logit_scale,
            project=packed and (lambda rows: packed(rows, head.weight, None)),
        )
        if dx is None:
            return losses, None
        return losses, rms_norm_backward(dx, hidden, norm.weight, norm.variance_epsilon)

    def layer_backward(
        self,
        layer: int,
        d_out: torch.Tensor,
        saved: Mapping[str, torch.Tensor],
        rotary: torch.Tensor,
        segments: list[RowSegment],
        adapter: LoraMatrices,
    ) -> torch.Tensor | None:
        needs = self._needs(layer, adapter.trained)
        chain = _Chain(self, layer, saved, rotary, segments, adapter)
        d_middle = self._mlp_backward(layer, d_out, chain, needs, adapter)
        if d_middle is None:
            return None
        d_attention = self._project_backward(
            layer,
            "o_proj",
            d_middle.to(self.dtype),
            lambda: chain.attention,
            adapter,
            needs.attention,
        )
        if d_attention is None:
            return None
        return self._attention_backward(
            layer, d_attention, d_middle, chain, rotary, segments, adapter, needs
        )

    def _mlp_backward(
        self, layer: int, d_out: torch.Tensor, chain: "_Chain", needs: _Needs, adapter: LoraMatrices
    ) -> torch.Tensor | None:
        """From the layer's output to the residual stream between attention and MLP."""
        dy = d_out.to(self.dtype)
        if not needs.gate_up:
            self._project_backward(
                layer, "down_proj", dy, lambda: swiglu(chain.gate_up), adapter, False
            )
            return None
        d_product = input_gradient(dy, self._weights.dense(layer, "down_proj"))
        if (group := adapter.group(layer, "down_proj")) is None:
            d_gate_up, _ = swiglu_backward(d_product, chain.gate_up)
        else:
            # The gradient of the product is complete before the product itself is known: SwiGLU's
            # backward computes both in one pass.
            g = lora_backward(dy, None, group, None, d_product)
            d_gate_up, product = swiglu_backward(d_product, chain.gate_up)
            lora_backward(dy, product, group, adapter.grad(layer, "down_proj"), None, g)
        norm = self._layers[layer].post_attention_layernorm
        d_normed = self._project_backward(
            layer,
            "gate_up_proj",
            d_gate_up,
            lambda: chain.normed_middle,
            adapter,
            needs.middle,
        )
        if d_normed is None:
            return None
        return rms_norm_backward(d_normed, chain.middle, norm.weight, norm.variance_epsilon, d_out)

    def _attention_backward(
        self,
        layer: int,
        d_attention: torch.Tensor,
        d_middle: torch.Tensor,
        chain: "_Chain",
        rotary: torch.Tensor,
        segments: list[RowSegment],
        adapter: LoraMatrices,
        needs: _Needs,
    ) -> torch.Tensor | None:
        """From the attention's output to the layer's input."""
        num_rows = d_attention.shape[0]
        heads = (num_rows, self.num_heads, self.head_size)
        kv_heads = (num_rows, self.num_kv_heads, self.head_size)
        widths = (self._q_size, self._kv_size, self._kv_size)
        d_qkv = torch.empty(num_rows, sum(widths), dtype=self.dtype)
        d_query, d_key, d_value = d_qkv.split(widths, dim=1)
        query, neox = chain.query.view(heads), self._rotary.is_neox_style
        dq = torch.empty(heads)
        for segment in segments:
            rows = segment.rows
            dq[rows] = attention_backward(
                d_attention.view(heads)[rows],
                query[rows],
                self.kv_cache(layer),
                segment.block_ids,
                segment.start,
                self._scale,
                segment.dk,
                segment.dv,
            )
            # All later queries have had their turn: the gradients of these K and V are complete.
            own = slice(segment.start, segment.start + rows.stop - rows.start)
            apply_rotary(
                segment.dk[:, own].transpose(0, 1),
                rotary[rows],
                neox,
                inverse=True,
                out=d_key.view(kv_heads)[rows],
            )
            d_value.view(kv_heads)[rows] = segment.dv[:, own].transpose(0, 1)
        apply_rotary(dq, rotary, neox, inverse=True, out=d_query.view(heads))
        norm = self._layers[layer].input_layernorm
        d_normed = self._project_backward(
            layer, "qkv_proj", d_qkv, lambda: chain.normed_hidden, adapter, needs.hidden
        )
        if d_normed is None:
            return None
        return rms_norm_backward(
            d_normed, chain.hidden, norm.weight, norm.variance_epsilon, d_middle
        )

    def _project_backward(
        self,
        layer: int,
        name: str,
        dy: torch.Tensor,
        x: Callable[[], torch.Tensor],
        adapter: LoraMatrices,
        need_dx: bool,
    ) -> torch.Tensor | None:
        """Accumulates the adapter's gradients and returns ``dX = dY W + ...``.

        ``x`` is called only where there is an adapter: what only it reads is not recomputed.
        """
        dx = input_gradient(dy, self._weights.dense(layer, name)) if need_dx else None
        if (group := adapter.group(layer, name)) is not None:
            lora_backward(dy, x(), group, adapter.grad(layer, name), dx)
        return dx


class _Chain:
    """The values of a layer's forward for a window of rows: kept ones, others computed when asked.

    See the module's docstring.
    """

    def __init__(
        self,
        model: LlamaBackward,
        layer: int,
        saved: Mapping[str, torch.Tensor],
        rotary: torch.Tensor,
        segments: list[RowSegment],
        adapter: LoraMatrices,
    ) -> None:
        self._model = model
        self._layer = layer
        self._values = dict(saved)
        self._rotary = rotary
        self._segments = segments
        self._adapter = adapter

    def _value(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self._values:
            self._values[name] = compute()
        return self._values[name]

    @property
    def hidden(self) -> torch.Tensor:
        return self._values["hidden"]

    @property
    def normed_hidden(self) -> torch.Tensor:
        norm = self._model._layers[self._layer].input_layernorm
        return self._value(
            "normed_hidden", lambda: rms_norm(self.hidden, norm.weight, norm.variance_epsilon)
        )

    @property
    def query(self) -> torch.Tensor:
        return self._value("query", self._compute_query)

    def _compute_query(self) -> torch.Tensor:
        model, layer = self._model, self._layer
        width, x = model._q_size, self.normed_hidden
        bias = model._weights.bias(layer, "qkv_proj")
        weight = model._weights.dense(layer, "qkv_proj")[:width]
        y = linear(x, weight, None if bias is None else bias[:width])
        self._add_lora(y, x, "qkv_proj")
        heads = (len(x), model.num_heads, model.head_size)
        return apply_rotary(y.view(heads), self._rotary, model._rotary.is_neox_style).flatten(1)

    @property
    def attention(self) -> torch.Tensor:
        return self._value("attention", self._compute_attention)

    def _compute_attention(self) -> torch.Tensor:
        model = self._model
        query = self.query.view(-1, model.num_heads, model.head_size)
        out = torch.empty_like(query)
        for segment in self._segments:
            out[segment.rows] = attention_forward(
                query[segment.rows],
                model.kv_cache(self._layer),
                segment.block_ids,
                segment.start,
                model._scale,
            )
        return out.flatten(1)

    @property
    def middle(self) -> torch.Tensor:
        return self._value(
            "middle", lambda: self._projected("o_proj", self.attention).add_(self.hidden)
        )

    @property
    def normed_middle(self) -> torch.Tensor:
        norm = self._model._layers[self._layer].post_attention_layernorm
        return self._value(
            "normed_middle", lambda: rms_norm(self.middle, norm.weight, norm.variance_epsilon)
        )

    @property
    def gate_up(self) -> torch.Tensor:
        return self._value("gate_up", lambda: self._projected("gate_up_proj", self.normed_middle))

    def _projected(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self._model._weights.project(self._layer, name, x)
        self._add_lora(y, x, name)
        return y

    def _add_lora(self, y: torch.Tensor, x: torch.Tensor, name: str) -> None:
        if (group := self._adapter.group(self._layer, name)) is not None:
            lora_add(y, x, group, [c for c in group.columns if c[1] <= y.shape[1]])
