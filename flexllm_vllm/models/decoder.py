"""The modules of vLLM's decoder layers that are built as Llama's are, and their sizes."""

from typing import Any

import torch

from flexllm_vllm.models.base import (
    ATTENTION_LORA_GROUPS,
    LORA_GROUPS,
    MERGED_LORA_GROUPS,
    LinearShape,
)
from flexllm_vllm.models.gated import gated_activation
from flexllm_vllm.models.norm import FrozenNorm
from flexllm_vllm.models.parallel import TensorParallel
from flexllm_vllm.models.rotary import LONG_ROPE, Rotary, cos_sin
from flexllm_vllm.models.routed import RoutedExperts, find_routed
from flexllm_vllm.models.weights import FrozenWeights, unwrapped

_ATTENTION = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")


class Decoder:
    """A loaded vLLM model of the Llama kind (Llama, Mistral, Qwen2, Qwen3, Granite, Gemma 2 and 3,
    Mixtral, Qwen3-MoE).

    Pre-norm residual layers, one merged linear each for q, k, v and for gate and up, rotary
    embedding, a gated activation. Layers may have a mixture of experts in place of the MLP; then
    adapters cover the attention alone. Linears may have biases; queries and keys may have a norm of
    each head. What attention and MLP add to the residual stream may pass a norm before (Gemma), or
    be scaled (Granite). Layers may differ in sliding window and rotary embedding.

    Args:
        model: vLLM's model.
        max_jobs: adapters that train at once.

    Attributes:
        layers: the decoder layers.
        norm: the final norm.
        lm_head: the loss head's linear.
        lora_groups: PEFT's names of the linears, by the merged linear that computes them.
        parallel: the tensor-parallel group; all numbers of heads and widths here, but for
            ``hidden_size``, are those of this rank.
        q_size, kv_size: widths of query and of key (or value) in the merged projection.
        scale: of the attention's logits.
        logit_scale, logit_soft_cap: of the loss head's logits, which are
            ``scale * cap * tanh(logits / cap)`` with a cap.
        has_head_norms: queries and keys have a norm of each head.
        has_post_norms: what attention and MLP add to the residual stream passes a norm.
        residual_multiplier: by which it is scaled.
        routed: of each layer, its mixture of experts; None where it has an MLP.
        activation: of the MLPs, or of the experts where there are none.
        intermediate_size: width of the MLPs, before the activation twice that; 0 without any.
        weights: the frozen weights, by layer and name of the merged linear.

    Raises:
        ValueError: this model has something that the backward does not cover.
    """

    def __init__(self, model: Any, max_jobs: int = 1) -> None:
        self.norm = model.model.norm
        self.layers = list(model.model.layers)
        # Gemma 2 has the embedding alone.
        self.lm_head = unwrapped(getattr(model, "lm_head", model.model.embed_tokens))
        self.vocab_size: int = model.config.vocab_size
        packed = getattr(model, "packed_modules_mapping", {})
        is_merged = packed.get("qkv_proj") == ["qkv_proj"]
        blocks = [find_routed(layer) for layer in self.layers]
        self.lora_groups: dict[str, tuple[str, ...]] = (
            MERGED_LORA_GROUPS if is_merged else LORA_GROUPS
        )
        if any(blocks):
            self.lora_groups = ATTENTION_LORA_GROUPS
        self.parallel = TensorParallel.of_this_worker()
        processor = unwrapped(model.logits_processor)
        self.logit_scale = float(getattr(processor, "scale", 1.0))
        self.logit_soft_cap: float | None = getattr(processor, "soft_cap", None)
        attention = self.layers[0].self_attn
        self.num_heads: int = attention.num_heads
        self.num_kv_heads: int = attention.num_kv_heads
        self.head_size: int = attention.head_dim
        self.q_size: int = attention.q_size
        self.kv_size: int = attention.kv_size
        self.scale: float = attention.scaling
        self.has_head_norms = getattr(attention, "q_norm", None) is not None
        self.has_post_norms = hasattr(self.layers[0], "pre_feedforward_layernorm")
        self.residual_multiplier = float(getattr(self.layers[0], "residual_multiplier", 1.0))
        self.routed = [None if block is None else RoutedExperts(block) for block in blocks]
        routed = [found for found in self.routed if found is not None]
        mlps = [layer.mlp for layer, block in zip(self.layers, blocks, strict=True) if not block]
        self.activation = gated_activation(mlps[0].act_fn) if mlps else routed[0].activation
        # Distinct ones: of layers that share an embedding vLLM shares the module.
        of_layers = [layer.self_attn.rotary_emb for layer in self.layers]
        self._rotaries = list({id(rotary): rotary for rotary in of_layers}.values())
        self._norms: dict[int, FrozenNorm] = {}
        norm_weight = self.layers[0].input_layernorm.weight
        self.hidden_size: int = norm_weight.shape[0]
        self.dtype: torch.dtype = norm_weight.dtype
        self.device: torch.device = norm_weight.device
        self.intermediate_size: int = (
            unwrapped(mlps[0].down_proj).input_size_per_partition if mlps else 0
        )
        inner = max([self.intermediate_size, *(found.intermediate_size for found in routed)])
        self.widest = max(self.q_size + 2 * self.kv_size, self.hidden_size, 2 * inner)
        self.weights = FrozenWeights(
            [self._linears(layer, block) for layer, block in zip(self.layers, blocks, strict=True)],
            num_kept=max_jobs,
        )
        self._check()

    @staticmethod
    def _linears(layer: Any, block: Any) -> dict[str, Any]:
        """The linears of a layer, which has an MLP or this block of experts."""
        attention, mlp = layer.self_attn, layer.mlp if block is None else None
        return {
            "qkv_proj": attention.qkv_proj,
            "o_proj": attention.o_proj,
            **(
                {"gate": block.gate}
                if mlp is None
                else {"gate_up_proj": mlp.gate_up_proj, "down_proj": mlp.down_proj}
            ),
        }

    def _check(self) -> None:
        """Refuses what the backward does not cover, rather than train with wrong gradients."""
        self.weights.check(self.dtype)
        attentions = [layer.self_attn for layer in self.layers]
        num_kv_heads, size = attentions[0].total_num_kv_heads, self.parallel.size
        if num_kv_heads % size:
            raise ValueError(
                f"finetuning needs a --tensor-parallel-size that divides the {num_kv_heads} KV "
                f"heads of the model, and {size} does not: vLLM would keep one on several ranks"
            )
        if any(getattr(x, "do_llama_4_scaling", False) for x in attentions):
            raise ValueError("finetuning does not support queries scaled by their position yet")
        if any(getattr(x, "sinks", None) is not None for x in attentions):
            raise ValueError("finetuning does not support attention sinks yet")
        if not all(getattr(x, "use_rope", True) for x in attentions):
            raise ValueError("finetuning does not support layers without a rotary embedding yet")
        for rotary in self._rotaries:
            if not any(hasattr(rotary, name) for name in ("cos_sin_cache", LONG_ROPE)):
                raise ValueError(
                    f"finetuning does not support the rotary embedding {type(rotary).__name__}"
                )

    def linear_shapes(self) -> dict[str, LinearShape]:
        """Shapes of the merged linears that an adapter may cover, whole."""
        hidden, size = self.hidden_size, self.parallel.size
        q, kv, inner = self.q_size * size, self.kv_size * size, self.intermediate_size * size

        def merged(*widths: int) -> LinearShape:
            if self.lora_groups is MERGED_LORA_GROUPS:
                return LinearShape(hidden, (sum(widths),), "output", (widths,))
            return LinearShape(hidden, widths, "output")

        shapes = {
            "qkv_proj": merged(q, kv, kv),
            "o_proj": LinearShape(q, (hidden,), "input"),
            "gate_up_proj": merged(inner, inner),
            "down_proj": LinearShape(inner, (hidden,), "input"),
        }
        return {name: shapes[name] for name in self.lora_groups}

    @property
    def head_rows(self) -> tuple[int, int]:
        """The tokens ``[first, end)`` whose rows of the loss head are on this rank."""
        indices = self.lm_head.shard_indices
        end = min(indices.org_vocab_end_index, self.vocab_size)
        return indices.org_vocab_start_index, end

    @staticmethod
    def module_path(layer: int, name: str) -> str:
        """Path of a linear (merged or PEFT's name) within the model."""
        parent = "self_attn" if name in _ATTENTION else "mlp"
        return f"model.layers.{layer}.{parent}.{name}"

    def sliding_window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees, itself among them; None for all before it."""
        return getattr(self.layers[layer].self_attn.attn, "sliding_window", None)

    def attention_soft_cap(self, layer: int) -> float | None:
        """Scores are ``soft_cap * tanh(scores / soft_cap)``; None for none."""
        implementation = getattr(self.layers[layer].self_attn.attn, "impl", None)
        return getattr(implementation, "logits_soft_cap", None) or None

    def mlp_norm(self, layer: int) -> Any:
        """The norm before the MLP, whose input is the residual stream after the attention."""
        modules = self.layers[layer]
        if self.has_post_norms:
            return modules.pre_feedforward_layernorm
        return modules.post_attention_layernorm

    def norm_of(self, module: Any) -> FrozenNorm:
        """What a norm of vLLM's computes."""
        found = self._norms.get(id(module))
        if found is None:
            found = self._norms[id(module)] = FrozenNorm.of(module)
        return found

    def kv_cache(self, layer: int) -> torch.Tensor:
        """The layer's paged KV cache."""
        return self.layers[layer].self_attn.attn.kv_cache

    def rotary_table(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines and sines ``[num_rows, num_tables * rotary_dim]`` float32 at these positions, of
        each distinct rotary embedding of the model."""
        tables = [cos_sin(rotary, positions) for rotary in self._rotaries]
        return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)

    def rotary_of(self, layer: int, table: torch.Tensor) -> Rotary:
        """A layer's rotary embedding at the positions of a :meth:`rotary_table`."""
        module, first = self.layers[layer].self_attn.rotary_emb, 0
        for rotary in self._rotaries:
            width = rotary.rotary_dim
            if rotary is module:
                own = table[:, first : first + width].contiguous()
                return Rotary(own, getattr(rotary, "is_neox_style", True))
            first += width
        raise AssertionError("every layer's embedding is among the model's")
