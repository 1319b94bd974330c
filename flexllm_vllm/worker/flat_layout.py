"""Where the matrices of an adapter lie in its flat buffers, whole and sharded.

An adapter is sharded as vLLM shards the layer and its LoRA slots. Of a linear that is sharded along
its output, A is replicated and B sharded; along its input, A is sharded and B replicated: FlexLLM's
dependent parallelization, in which the adapter's forward and backward need no collective beyond
those of the base layer. Each rank has a part of the gradient of a replicated matrix, so these lie
together at the beginning of a rank's buffer, to be summed in one piece, once a step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexllm_vllm.kernels.lora import LoraGroup
from flexllm_vllm.models.base import ModelBackward
from flexllm_vllm.plan import TrainAdapter

LinearKey = tuple[int, str]
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Matrix:
    """A matrix of the adapter: the A of all targets of a merged linear, or the B of one.

    Attributes:
        shape: of the whole matrix.
        local: of this rank's part.
        sharded: the dimension along which it is a part; None where every rank has all of it.
        parts: widths along it that are sharded one by one; empty where it is sharded as a whole.
        whole_offset, offset: first element in the whole adapter's buffer, and in this rank's.
    """

    shape: tuple[int, int]
    local: tuple[int, int]
    sharded: int | None
    parts: tuple[int, ...] = ()
    whole_offset: int = 0
    offset: int = 0

    def of_whole(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.whole_offset : self.whole_offset + math.prod(self.shape)].view(self.shape)

    def of_rank(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.offset + math.prod(self.local)].view(self.local)

    def pieces(
        self, whole: torch.Tensor, local: torch.Tensor, rank: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the same elements in the whole adapter's buffer and in a rank's."""
        in_whole, in_local, dim = self.of_whole(whole), self.of_rank(local), self.sharded
        if dim is None:
            yield in_whole, in_local
            return
        size = self.shape[dim] // self.local[dim]
        first = 0
        for part in self.parts or (self.shape[dim],):
            width = part // size
            yield (
                in_whole.narrow(dim, first + rank * width, width),
                in_local.narrow(dim, first // size, width),
            )
            first += part


@dataclass
class _Linear:
    """A merged linear with matrices: the places of its targets in the merged output, and the widths
    there on this rank."""

    targets: list[int]
    widths: list[int]
    a: _Matrix
    b: list[_Matrix]


class FlatLayout:
    """The flat layouts of an adapter: the whole one, which checkpoints have, and a rank's.

    Args:
        spec: what the job asked for.
        model: its layers and linears.

    Attributes:
        whole_size: elements of the whole adapter.
        size: elements of this rank's buffer.
        num_replicated: elements at its beginning that other ranks have as well.

    Raises:
        ValueError: ``layers_to_transform`` names a layer that the model does not have.
    """

    def __init__(self, spec: TrainAdapter, model: ModelBackward) -> None:
        self._spec, self._model, self._parallel = spec, model, model.parallel
        self._linears: dict[LinearKey, _Linear] = {}
        for layer in _layers(spec, model.num_layers):
            for name in model.linear_shapes():
                linear = self._linear(name)
                if linear.targets:
                    self._linears[layer, name] = linear
        matrices = self._matrices()
        self.whole_size = 0
        for matrix in matrices:
            matrix.whole_offset = self.whole_size
            self.whole_size += math.prod(matrix.shape)
        replicated = [m for m in matrices if m.sharded is None and self._parallel.size > 1]
        self.num_replicated = sum(math.prod(m.local) for m in replicated)
        self.size, in_front = 0, {id(m) for m in replicated}
        for matrix in sorted(matrices, key=lambda m: id(m) not in in_front):
            matrix.offset = self.size
            self.size += math.prod(matrix.local)

    def _linear(self, name: str) -> _Linear:
        shape, r, size = self._model.linear_shapes()[name], self._spec.r, self._parallel.size
        by_output = shape.sharded == "output"
        targets = [
            i for i, t in enumerate(self._model.lora_groups[name]) if t in self._spec.target_modules
        ]
        rows = len(targets) * r
        in_features = shape.in_features if by_output else shape.in_features // size
        widths = [width // size if by_output else width for width in shape.out_features]
        return _Linear(
            targets,
            widths,
            _Matrix((rows, shape.in_features), (rows, in_features), None if by_output else 1),
            [
                _Matrix(
                    (shape.out_features[i], r),
                    (widths[i], r),
                    0 if by_output else None,
                    parts=shape.parts[i] if shape.parts else (),
                )
                for i in targets
            ],
        )

    @property
    def keys(self) -> frozenset[LinearKey]:
        """(layer, name) of the merged linears with matrices."""
        return frozenset(self._linears)

    def groups(self, flat: torch.Tensor) -> dict[LinearKey, LoraGroup]:
        """Views of a rank's buffer, by (layer, name) of the merged linear."""
        found = {}
        for key, linear in self._linears.items():
            columns = [
                (sum(linear.widths[:i]), sum(linear.widths[: i + 1])) for i in linear.targets
            ]
            b = tuple(matrix.of_rank(flat) for matrix in linear.b)
            found[key] = LoraGroup(linear.a.of_rank(flat), b, tuple(columns), self._spec.scaling)
        return found

    def slices(self, key: LinearKey) -> list[int]:
        """The places of a merged linear's targets in its output, in the order of its B."""
        return self._linears[key].targets

    def matrices(self, whole: torch.Tensor) -> Matrices:
        """Views of a whole adapter's buffer: path of each target linear in the model -> its A
        ``[r, in]`` and B ``[out, r]``."""
        found, r = {}, self._spec.r
        for (layer, name), linear in self._linears.items():
            a = linear.a.of_whole(whole)
            for i, (index, b) in enumerate(zip(linear.targets, linear.b, strict=True)):
                path = self._model.module_path(layer, self._model.lora_groups[name][index])
                found[path] = (a[i * r : (i + 1) * r], b.of_whole(whole))
        return found

    def shard(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's buffer of a whole adapter's; the same tensor where there is one rank."""
        if self._parallel.size == 1:
            return whole
        flat = whole.new_empty(self.size)
        for matrix in self._matrices():
            for of_whole, of_rank in matrix.pieces(whole, flat, self._parallel.rank):
                of_rank.copy_(of_whole)
        return flat

    def gather(self, flat: torch.Tensor) -> torch.Tensor:
        """The whole adapter's buffer of the ranks'; the same tensor where there is one rank.

        Collective: every rank must call it.
        """
        if self._parallel.size == 1:
            return flat
        whole = flat.new_empty(self.whole_size)
        for rank, part in enumerate(self._parallel.all_gather(flat)):
            for matrix in self._matrices():
                if rank == 0 or matrix.sharded is not None:
                    for of_whole, of_rank in matrix.pieces(whole, part, rank):
                        of_whole.copy_(of_rank)
        return whole

    def _matrices(self) -> list[_Matrix]:
        return [m for linear in self._linears.values() for m in (linear.a, *linear.b)]


def _layers(spec: TrainAdapter, num_layers: int) -> list[int]:
    layers = list(range(num_layers))
    if spec.layers_to_transform is None:
        return layers
    wanted = set(spec.layers_to_transform)
    if not wanted <= set(layers):
        raise ValueError(
            f"layers_to_transform names layer {max(wanted)}, the model has {num_layers}"
        )
    return sorted(wanted)
