"""Backward of Llama's decoder layers and those built like them.

It mirrors ``llama.py``, ``mistral.py``, ``qwen2.py``, ``qwen3.py``, ``granite.py``, ``gemma2.py``,
``gemma3.py``, ``mixtral.py`` and ``qwen3_moe.py`` of ``vllm/model_executor/models``. A layer's
forward is a chain, and any value of it can be kept or computed again from those before
(:class:`LayerChain`). K and V are read from the paged cache; norms before a linear, the
activation's product and the softmax rows are always recomputed. Which of the chain's values are
needed at all follows from the adapter's targets (``LlamaBackward._needs``), which of those are kept
from the policy (``LlamaBackward.saved``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexllm_vllm.kernels import xformers_attention
from flexllm_vllm.kernels.cross_entropy import (
    LogitForm,
    TokenLosses,
    linear_cross_entropy,
    release_buffers,
)
from flexllm_vllm.kernels.linear import use_onednn
from flexllm_vllm.kernels.lora import lora_backward
from flexllm_vllm.kernels.paged_attention import attention_backward
from flexllm_vllm.models.base import (
    ActivationPolicy,
    Capture,
    LoraMatrices,
    RowSegment,
    TrainedLinears,
)
from flexllm_vllm.models.chain import LayerChain
from flexllm_vllm.models.decoder import Decoder
from flexllm_vllm.models.rotary import Rotary
from flexllm_vllm.models.routed import RoutedExperts
from flexllm_vllm.models.vocab_parallel import linear_cross_entropy_sharded

# Linears that are sharded along their output: each rank has a part of the gradient of their input.
_SUMMED_BACKWARD = ("qkv_proj", "gate_up_proj")


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
    """See :class:`flexllm_vllm.models.base.ModelBackward`; of any :class:`Decoder`."""

    def __init__(self, model: Any, max_jobs: int = 1, attention_backend: str = "native") -> None:
        self._decoder = decoder = Decoder(model, max_jobs)
        self._attention = attention_backward
        if attention_backend == "xformers":
            xformers_attention.check(
                decoder.num_heads,
                decoder.num_kv_heads,
                decoder.head_size,
                decoder.dtype,
                decoder.device,
            )
            self._attention = xformers_attention.attention_backward
        self.num_layers = len(decoder.layers)
        self.num_kv_heads = decoder.num_kv_heads
        self.head_size = decoder.head_size
        self.hidden_size = decoder.hidden_size
        self.vocab_size = decoder.vocab_size
        self.dtype = decoder.dtype
        self.device = decoder.device
        self.parallel = decoder.parallel
        self.widest = decoder.widest
        self.lora_groups = decoder.lora_groups
        self.linear_shapes = decoder.linear_shapes
        self.module_path = decoder.module_path
        self.kv_cache = decoder.kv_cache
        self.rotary_table = decoder.rotary_table

    def release(self) -> None:
        self._decoder.weights.forget()
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
        projections. ``minimal`` keeps the first value that is needed. Of a mixture of experts no
        policy keeps anything.
        """
        if layer < trained.lowest_layer:
            return {}
        decoder, needs = self._decoder, self._needs(layer, trained)
        width = {
            "hidden": self.hidden_size,
            "query": decoder.q_size,
            "projected": decoder.q_size + decoder.kv_size,
            "attention": decoder.q_size,
            "attended": self.hidden_size,
            "middle": self.hidden_size,
            "transformed": self.hidden_size,
            "gate_up": 2 * decoder.intermediate_size,
        }
        trains_out = (layer, "o_proj") in trained
        post_norms = decoder.has_post_norms
        # The attention's output is only the input of o_proj, and its backward needs none: it is
        # needed by o_proj's LoRA, and by a norm of o_proj's output.
        needs_output = trains_out or (post_norms and needs.attention)
        wanted = []
        if policy == "store":
            query = "projected" if decoder.has_head_norms else "query"
            wanted += ["hidden", query] if needs.attention else []
            wanted += ["attention"] if trains_out else []
            wanted += ["attended"] if post_norms and needs_output else []
            trains_gate_up = (layer, "gate_up_proj") in trained
            wanted += ["middle"] if needs.middle or trains_gate_up else []
            wanted += ["gate_up"] if decoder.routed[layer] is None else []
            wanted += ["transformed"] if post_norms else []
        elif needs_output and policy == "balanced":
            wanted += ["hidden", "attention"]
        elif not (needs.attention or needs_output):
            wanted += ["middle"]
        else:
            wanted += ["hidden"] if policy == "minimal" else ["hidden", "middle"]
        return {name: width[name] for name in wanted}

    def install_capture(self, capture: Capture) -> Callable[[], None]:
        def on_stream(index: int, name: str, position: int) -> Any:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                addend = args[position + 1] if len(args) > position + 1 else None
                capture(index, name, args[position], addend)

            return hook

        def on_input(index: int, name: str) -> Any:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                capture(index, name, args[0], None)

            return hook

        def on_output(index: int, name: str, width: int) -> Any:
            def hook(_: Any, __: Any, output: Any) -> None:
                capture(index, name, output[0][:, :width], None)

            return hook

        decoder = self._decoder
        handles = [decoder.norm.register_forward_pre_hook(on_stream(self.num_layers, "hidden", 0))]
        for index, layer in enumerate(decoder.layers):
            # Not the activation's input: layers may share that module.
            outputs = []
            if decoder.routed[index] is None:
                outputs.append((layer.mlp.gate_up_proj, "gate_up", 2 * decoder.intermediate_size))
            if decoder.has_head_norms:
                width = decoder.q_size + decoder.kv_size
                outputs.append((layer.self_attn.qkv_proj, "projected", width))
            for module, name, width in outputs:
                handles.append(module.register_forward_hook(on_output(index, name, width)))
            hooks = [
                (layer, on_stream(index, "hidden", 1)),
                (layer.self_attn.attn, on_input(index, "query")),
                (layer.self_attn.o_proj, on_input(index, "attention")),
                (decoder.mlp_norm(index), on_stream(index, "middle", 0)),
            ]
            if decoder.has_post_norms:
                hooks += [
                    (layer.post_attention_layernorm, on_input(index, "attended")),
                    (layer.post_feedforward_layernorm, on_input(index, "transformed")),
                ]
            for module, hook in hooks:
                handles.append(module.register_forward_pre_hook(hook))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    # -- the backward ------------------------------------------------------------------------

    def loss_head(
        self, hidden: torch.Tensor, targets: torch.Tensor, scale: float
    ) -> tuple[TokenLosses, torch.Tensor | None]:
        norm, head = self._decoder.norm_of(self._decoder.norm), self._decoder.lm_head
        first, end = self._decoder.head_rows
        weight = head.weight[: end - first]
        packed = None
        # Packed by oneDNN, the head is the faster one for any number of rows where it is for one.
        is_fast = weight.dtype != torch.float32 or use_onednn(1)
        if len(head.weight) == len(weight) and is_fast:
            packed = getattr(head, "cpu_linear", None)
        x = norm.forward(hidden)
        logits = LogitForm(self._decoder.logit_scale, self._decoder.logit_soft_cap)
        if self.parallel.size > 1:
            losses, dx = linear_cross_entropy_sharded(
                x, weight, targets, scale, logits, first, self.parallel
            )
        else:
            losses, dx = linear_cross_entropy(
                x,
                weight,
                targets,
                scale,
                logits,
                project=packed and (lambda rows: packed(rows, head.weight, None)),
            )
        if dx is None:
            return losses, None
        return losses, norm.backward(dx, hidden)

    def layer_backward(
        self,
        layer: int,
        d_out: torch.Tensor,
        saved: Mapping[str, torch.Tensor],
        rotary: torch.Tensor,
        segments: list[RowSegment],
        adapter: LoraMatrices,
    ) -> torch.Tensor | None:
        decoder, needs = self._decoder, self._needs(layer, adapter.trained)
        turned = decoder.rotary_of(layer, rotary)
        chain = LayerChain(decoder, layer, saved, turned, segments, adapter)
        d_middle = self._mlp_backward(layer, d_out, chain, needs, adapter)
        if d_middle is None:
            return None
        d_attention = self._project_backward(
            layer,
            "o_proj",
            self._added_backward(
                d_middle,
                lambda: chain.attended,
                lambda: decoder.layers[layer].post_attention_layernorm,
            ),
            lambda: chain.attention,
            adapter,
            needs.attention,
        )
        if d_attention is None:
            return None
        return self._attention_backward(
            layer, d_attention, d_middle, chain, turned, segments, adapter, needs
        )

    def _added_backward(
        self, d_sum: torch.Tensor, x: Callable[[], torch.Tensor], norm: Callable[[], Any]
    ) -> torch.Tensor:
        """From the residual stream to the output of attention or MLP that was added to it.

        Args:
            d_sum: ``[num_rows, hidden_size]`` float32.
            x: that output.
            norm: that it passes, where the model has one.
        """
        decoder = self._decoder
        if decoder.residual_multiplier != 1.0:
            d_sum = d_sum * decoder.residual_multiplier
        if decoder.has_post_norms:
            d_sum = decoder.norm_of(norm()).backward(d_sum, x())
        return d_sum.to(self.dtype)

    def _mlp_backward(
        self,
        layer: int,
        d_out: torch.Tensor,
        chain: LayerChain,
        needs: _Needs,
        adapter: LoraMatrices,
    ) -> torch.Tensor | None:
        """From the layer's output to the residual stream between attention and MLP."""
        decoder = self._decoder
        activation = decoder.activation
        dy = self._added_backward(
            d_out,
            lambda: chain.transformed,
            lambda: decoder.layers[layer].post_feedforward_layernorm,
        )
        if (experts := decoder.routed[layer]) is not None:
            if not needs.middle:
                return None
            d_normed = self._routed_backward(layer, experts, dy, chain.normed_middle)
            return decoder.norm_of(decoder.mlp_norm(layer)).backward(d_normed, chain.middle, d_out)
        if not needs.gate_up:
            self._project_backward(
                layer, "down_proj", dy, lambda: activation.forward(chain.gate_up), adapter, False
            )
            return None
        d_product = self._decoder.weights.input_gradient(layer, "down_proj", dy)
        if (group := adapter.group(layer, "down_proj")) is None:
            d_gate_up, _ = activation.backward(d_product, chain.gate_up)
        else:
            # The gradient of the product is complete before the product itself is known: the
            # activation's backward computes both in one pass.
            g = lora_backward(dy, None, group, None, d_product)
            d_gate_up, product = activation.backward(d_product, chain.gate_up)
            lora_backward(dy, product, group, adapter.grad(layer, "down_proj"), None, g)
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
        return decoder.norm_of(decoder.mlp_norm(layer)).backward(d_normed, chain.middle, d_out)

    def _routed_backward(
        self, layer: int, experts: RoutedExperts, dy: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        dx, d_logits = experts.backward(dy, x)
        dx += self._decoder.weights.input_gradient(layer, "gate", d_logits.to(self.dtype))
        return self.parallel.all_reduce(dx.to(self.dtype))

    def _attention_backward(
        self,
        layer: int,
        d_attention: torch.Tensor,
        d_middle: torch.Tensor,
        chain: LayerChain,
        rotary: Rotary,
        segments: list[RowSegment],
        adapter: LoraMatrices,
        needs: _Needs,
    ) -> torch.Tensor | None:
        """From the attention's output to the layer's input."""
        decoder, num_rows = self._decoder, d_attention.shape[0]
        heads = (num_rows, decoder.num_heads, decoder.head_size)
        kv_heads = (num_rows, decoder.num_kv_heads, decoder.head_size)
        widths = (decoder.q_size, decoder.kv_size, decoder.kv_size)
        d_qkv = torch.empty(num_rows, sum(widths), dtype=self.dtype, device=self.device)
        d_query, d_key, d_value = d_qkv.split(widths, dim=1)
        query = chain.query.view(heads)
        dq = torch.empty(heads, device=self.device)
        for segment in segments:
            rows = segment.rows
            dq[rows] = self._attention(
                d_attention.view(heads)[rows],
                query[rows],
                self.kv_cache(layer),
                segment.block_ids,
                segment.start,
                decoder.scale,
                segment.dk,
                segment.dv,
                decoder.sliding_window(layer),
                decoder.attention_soft_cap(layer),
            )
            # All later queries have had their turn: the gradients of these K and V are complete.
            own = slice(segment.start, segment.start + rows.stop - rows.start)
            rotary[rows].apply(
                segment.dk[:, own].transpose(0, 1),
                inverse=True,
                out=d_key.view(kv_heads)[rows],
            )
            d_value.view(kv_heads)[rows] = segment.dv[:, own].transpose(0, 1)
        rotary.apply(dq, inverse=True, out=d_query.view(heads))
        modules = decoder.layers[layer]
        if decoder.has_head_norms:
            raw = chain.projected.split(widths[:2], dim=1)
            decoder.norm_of(modules.self_attn.q_norm).heads_backward_(d_query, raw[0])
            decoder.norm_of(modules.self_attn.k_norm).heads_backward_(d_key, raw[1])
        norm = decoder.norm_of(modules.input_layernorm)
        d_normed = self._project_backward(
            layer, "qkv_proj", d_qkv, lambda: chain.normed_hidden, adapter, needs.hidden
        )
        if d_normed is None:
            return None
        return norm.backward(d_normed, chain.hidden, d_middle)

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

        ``x`` is called only where there is an adapter: what only it reads is not recomputed. The
        collective is the one that the base layer's own backward has; the adapter adds none (its
        part of ``dX`` is in the sum, and the gradients of its replicated matrices are summed once
        a step): what FlexLLM calls dependent parallelization.
        """
        dx = self._decoder.weights.input_gradient(layer, name, dy) if need_dx else None
        if (group := adapter.group(layer, name)) is not None:
            lora_backward(dy, x(), group, adapter.grad(layer, name), dx)
        if dx is not None and name in _SUMMED_BACKWARD:
            return self.parallel.all_reduce(dx)
        return dx
