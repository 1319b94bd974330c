"""The linear layers of a base model that an adapter may cover."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LinearShape:
    """A linear of a decoder layer.

    Attributes:
        path: within the layer, such as ``self_attn.q_proj``.
    """

    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseLinears:
    """The linears of all decoder layers, which have one shape each.

    Attributes:
        linears: by the last component of their path, in the order in which the model has them.
    """

    num_layers: int
    linears: dict[str, LinearShape]

    def paths(self) -> list[str]:
        """Paths of all of them in the model, in its order."""
        return [
            f"model.layers.{layer}.{linear.path}"
            for layer in range(self.num_layers)
            for linear in self.linears.values()
        ]

    def adapter_bytes(self, r: int) -> int:
        """Size of an adapter of rank ``r`` on all of them in float32, without its header."""
        features = sum(x.in_features + x.out_features for x in self.linears.values())
        return 4 * r * features * self.num_layers

    def smallest_features(self) -> int:
        """The smallest side of all their matrices."""
        return min(min(x.in_features, x.out_features) for x in self.linears.values())


def base_linears(config: Any) -> BaseLinears:
    """Those of a model, by its configuration of ``transformers``.

    Most are built as Llama is; Phi-3 has q, k and v in one linear, and gate and up. Of a mixture of
    experts, where some layers may have an MLP instead, they are those of the attention.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    if config.model_type == "phi3":
        return _by_name(
            config,
            {
                "self_attn.qkv_proj": (hidden, q + 2 * kv),
                "self_attn.o_proj": (q, hidden),
                "mlp.gate_up_proj": (hidden, 2 * inner),
                "mlp.down_proj": (inner, hidden),
            },
        )
    shapes = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    if getattr(config, "num_experts_per_tok", None):
        shapes = {path: shape for path, shape in shapes.items() if path.startswith("self_attn.")}
    return _by_name(config, shapes)


def _by_name(config: Any, shapes: dict[str, tuple[int, int]]) -> BaseLinears:
    linears = {path.split(".")[1]: LinearShape(path, *shape) for path, shape in shapes.items()}
    return BaseLinears(config.num_hidden_layers, linears)
