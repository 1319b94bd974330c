"""The modules of vLLM's decoder layers that are built as Llama's are, and their sizes."""

from typing import Any

import torch

from flexllm_vllm.models.base import LinearShape
from flexllm_vllm.models.parallel import TensorParallel
from flexllm_vllm.models.weights import FrozenWeights, unwrapped

_ATTENTION = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")


class Decoder:
    """A loaded vLLM model of the Llama kind (Llama, Mistral, Qwen2, Qwen3).

    Pre-norm residual layers, one merged linear each for q, k, v and for gate and up, rotary
    embedding, SwiGLU. Linears may have biases; queries and keys may have a norm of each head.

    Args:
        model: vLLM's model.
        max_jobs: adapters that train at once.

    Attributes:
        layers: the decoder layers.
        norm: the final norm.
        lm_head: the loss head's linear.
        parallel: the tensor-parallel group; all numbers of heads and widths here, but for
            ``hidden_size``, are those of this rank.
        q_size, kv_size: widths of query and of key (or value) in the merged projection.
        scale: of the attention's logits.
        rotary: vLLM's rotary embedding.
        weights: the frozen weights, by layer and name of the merged linear.

    Raises:
        ValueError: this model has something that the backward does not cover.
    """

    def __init__(self, model: Any, max_jobs: int = 1) -> None:
        self.norm = model.model.norm
        self.layers = list(model.model.layers)
        self.lm_head = unwrapped(model.lm_head)
        self.vocab_size: int = model.config.vocab_size
        self.parallel = TensorParallel.of_this_worker()
        self.logit_scale = float(getattr(unwrapped(model.logits_processor), "scale", 1.0))
        attention = self.layers[0].self_attn
        self.num_heads: int = attention.num_heads
        self.num_kv_heads: int = attention.num_kv_heads
        self.head_size: int = attention.head_dim
        self.q_size: int = attention.q_size
        self.kv_size: int = attention.kv_size
        self.scale: float = attention.scaling
        self.rotary = attention.rotary_emb
        self.has_head_norms = getattr(attention, "q_norm", None) is not None
        norm_weight = self.layers[0].input_layernorm.weight
        self.hidden_size: int = norm_weight.shape[0]
        self.dtype: torch.dtype = norm_weight.dtype
        self.device: torch.device = norm_weight.device
        self.intermediate_size: int = unwrapped(
            self.layers[0].mlp.down_proj
        ).input_size_per_partition
        self.weights = FrozenWeights(
            [
                {
                    "qkv_proj": layer.self_attn.qkv_proj,
                    "o_proj": layer.self_attn.o_proj,
                    "gate_up_proj": layer.mlp.gate_up_proj,
                    "down_proj": layer.mlp.down_proj,
                }
                for layer in self.layers
            ],
            num_kept=max_jobs,
        )
        self._check()

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
        if not hasattr(self.rotary, "cos_sin_cache"):
            raise ValueError(
                f"finetuning does not support the rotary embedding {type(self.rotary).__name__}"
            )

    def linear_shapes(self) -> dict[str, LinearShape]:
        """Shapes of the merged linears of a layer, whole."""
        hidden, size = self.hidden_size, self.parallel.size
        q, kv, inner = self.q_size * size, self.kv_size * size, self.intermediate_size * size
        return {
            "qkv_proj": LinearShape(hidden, (q, kv, kv), "output"),
            "o_proj": LinearShape(q, (hidden,), "input"),
            "gate_up_proj": LinearShape(hidden, (inner, inner), "output"),
            "down_proj": LinearShape(inner, (hidden,), "input"),
        }

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

    def kv_cache(self, layer: int) -> torch.Tensor:
        """The layer's paged KV cache."""
        return self.layers[layer].self_attn.attn.kv_cache

    def rotary_table(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines and sines ``[num_rows, rotary_dim]`` float32 at these positions."""
        return self.rotary.cos_sin_cache.index_select(0, positions).float()
