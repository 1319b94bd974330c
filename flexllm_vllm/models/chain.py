"""The values of a decoder layer's forward, kept or computed again."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flexllm_vllm.kernels.lora import lora_add
from flexllm_vllm.kernels.paged_attention import attention_forward
from flexllm_vllm.models.base import LoraMatrices, RowSegment
from flexllm_vllm.models.decoder import Decoder
from flexllm_vllm.models.rotary import Rotary


class LayerChain:
    """Values of one layer's forward for a window of rows: kept ones, others computed when asked.

    ``hidden -> (norm, q, k) projected -> (head norms, rotary) query -> (softmax K V) attention ->
    (o_proj) attended -> (+ hidden) middle -> (norm) gate_up -> (activation, down_proj)
    transformed``; ``projected`` only where queries and keys have norms, ``attended`` and
    ``transformed`` only where they pass norms themselves.

    Args:
        decoder: the model.
        layer: index of the layer.
        saved: values by name, ``[num_rows, width]`` each.
        rotary: of the layer, at the rows' positions.
        segments: the sequences that the rows belong to.
        adapter: the job's adapter.
    """

    def __init__(
        self,
        decoder: Decoder,
        layer: int,
        saved: Mapping[str, torch.Tensor],
        rotary: Rotary,
        segments: list[RowSegment],
        adapter: LoraMatrices,
    ) -> None:
        self._decoder = decoder
        self._layer = layer
        self._modules = decoder.layers[layer]
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
        """``[num_rows, hidden_size]``, the layer's input."""
        return self._values["hidden"]

    @property
    def normed_hidden(self) -> torch.Tensor:
        """``[num_rows, hidden_size]``, the input of q, k and v."""
        return self._value(
            "normed_hidden", lambda: self._normed(self.hidden, self._modules.input_layernorm)
        )

    @property
    def projected(self) -> torch.Tensor:
        """``[num_rows, q_size + kv_size]``: queries and keys before their norms."""
        decoder = self._decoder
        return self._value(
            "projected", lambda: self._query_key_value(decoder.q_size + decoder.kv_size)
        )

    @property
    def query(self) -> torch.Tensor:
        """``[num_rows, q_size]``, as the attention reads it."""
        return self._value("query", self._compute_query)

    def _compute_query(self) -> torch.Tensor:
        decoder, norm = self._decoder, self._modules.self_attn
        heads = (-1, decoder.num_heads, decoder.head_size)
        if decoder.has_head_norms:
            raw = self.projected[:, : decoder.q_size].reshape(-1, decoder.head_size)
            y = self._normed(raw, norm.q_norm)
        else:
            y = self._query_key_value(decoder.q_size)
        return self._rotary.apply(y.view(heads)).flatten(1)

    def _query_key_value(self, width: int) -> torch.Tensor:
        """The first columns of the merged projection."""
        x = self.normed_hidden
        y = self._decoder.weights.first_columns(self._layer, "qkv_proj", x, width)
        self._add_lora(y, x, "qkv_proj")
        return y

    @property
    def attention(self) -> torch.Tensor:
        """``[num_rows, q_size]``, the input of o_proj."""
        return self._value("attention", self._compute_attention)

    def _compute_attention(self) -> torch.Tensor:
        decoder = self._decoder
        query = self.query.view(-1, decoder.num_heads, decoder.head_size)
        out = torch.empty_like(query)
        for segment in self._segments:
            out[segment.rows] = attention_forward(
                query[segment.rows],
                decoder.kv_cache(self._layer),
                segment.block_ids,
                segment.start,
                decoder.scale,
                decoder.sliding_window(self._layer),
                decoder.attention_soft_cap(self._layer),
            )
        return out.flatten(1)

    @property
    def middle(self) -> torch.Tensor:
        """``[num_rows, hidden_size]``, the residual stream between attention and MLP."""
        return self._value("middle", self._compute_middle)

    def _compute_middle(self) -> torch.Tensor:
        decoder = self._decoder
        if decoder.has_post_norms:
            added = self._normed(self.attended, self._modules.post_attention_layernorm)
        else:
            added = self._sum_of("o_proj", self.attention)
        if decoder.residual_multiplier != 1.0:
            added *= decoder.residual_multiplier
        return added.add_(self.hidden)

    @property
    def attended(self) -> torch.Tensor:
        """``[num_rows, hidden_size]``, the output of o_proj."""
        return self._value("attended", lambda: self._sum_of("o_proj", self.attention))

    @property
    def transformed(self) -> torch.Tensor:
        """``[num_rows, hidden_size]``, the output of down_proj."""
        return self._value("transformed", self._compute_transformed)

    def _compute_transformed(self) -> torch.Tensor:
        return self._sum_of("down_proj", self._decoder.activation.forward(self.gate_up))

    @property
    def normed_middle(self) -> torch.Tensor:
        """``[num_rows, hidden_size]``, the MLP's input."""
        norm = self._decoder.mlp_norm(self._layer)
        return self._value("normed_middle", lambda: self._normed(self.middle, norm))

    @property
    def gate_up(self) -> torch.Tensor:
        """``[num_rows, 2 * intermediate_size]``, the input of the activation."""
        return self._value("gate_up", lambda: self._output_of("gate_up_proj", self.normed_middle))

    def _normed(self, x: torch.Tensor, module: Any) -> torch.Tensor:
        return self._decoder.norm_of(module).forward(x)

    def _sum_of(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The output of a linear that is sharded along its input."""
        return self._decoder.parallel.all_reduce(self._output_of(name, x))

    def _output_of(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self._decoder.weights.project(self._layer, name, x)
        self._add_lora(y, x, name)
        return y

    def _add_lora(self, y: torch.Tensor, x: torch.Tensor, name: str) -> None:
        if (group := self._adapter.group(self._layer, name)) is not None:
            lora_add(y, x, group.first_columns(y.shape[1]))
