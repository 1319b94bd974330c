"""A LoRA adapter in training: float32 master weights, gradients, AdamW."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from flexllm_vllm.checkpoints import ADAPTER_FILES, OPTIMIZER_FILE
from flexllm_vllm.kernels.lora import LoraGroup
from flexllm_vllm.models.base import LORA_GROUPS, ModelBackward, TrainedLinears
from flexllm_vllm.plan import TrainAdapter

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSnapshot:
    """What an adapter was at one moment.

    Attributes:
        spec: of the adapter.
        matrices: as of :meth:`TrainableAdapter.matrices`.
        optimizer: AdamW's state, empty before the first step.
    """

    spec: TrainAdapter
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    optimizer: dict[str, torch.Tensor]


class TrainableAdapter:
    """All matrices of an adapter lie in one flat buffer, so that clipping and AdamW are a few
    operations whatever the number of layers; the matrices are views of it.

    Attributes:
        spec: what the job asked for.
        trained: the linears that have matrices.

    Raises:
        ValueError: ``layers_to_transform`` names a layer that the model does not have.
    """

    def __init__(self, spec: TrainAdapter, model: ModelBackward) -> None:
        self.spec = spec
        self._layout: dict[tuple[int, str], list[tuple[str, torch.Size, int]]] = {}
        self._model = model
        layers = list(range(model.num_layers))
        if spec.layers_to_transform is not None:
            wanted = set(spec.layers_to_transform)
            if not wanted <= set(layers):
                raise ValueError(
                    f"layers_to_transform names layer {max(wanted)}, the model has {len(layers)}"
                )
            layers = sorted(wanted)
        offset = 0
        for layer in layers:
            for name, shape in model.linear_shapes().items():
                targets = [t for t in LORA_GROUPS[name] if t in spec.target_modules]
                if not targets:
                    continue
                entries = [("A", torch.Size((len(targets) * spec.r, shape.in_features)), offset)]
                offset += entries[0][1].numel()
                for target in targets:
                    width = shape.out_features[LORA_GROUPS[name].index(target)]
                    entries.append((target, torch.Size((width, spec.r)), offset))
                    offset += width * spec.r
                self._layout[layer, name] = entries
        self.trained = TrainedLinears(frozenset(self._layout))
        # Plain tensors: vLLM runs the worker in inference mode, whose tensors cannot be updated
        # outside of it.
        with torch.inference_mode(False):
            self._weights = torch.nn.Parameter(torch.zeros(offset), requires_grad=True)
            self._grads = torch.zeros(offset)
            self._pack_grads = torch.zeros(offset)
            self._optimizer = torch.optim.AdamW(
                [self._weights],
                betas=spec.betas,
                eps=spec.eps,
                weight_decay=spec.weight_decay,
                fused=True,
            )
        weights = self._weights.detach()
        self._groups = {key: self._views(weights, key) for key in self._layout}
        self._pack_groups = {key: self._views(self._pack_grads, key) for key in self._layout}
        if spec.resume_path is not None:
            self.load(Path(spec.resume_path))
            self._load_optimizer(Path(spec.resume_path))
        elif spec.init_path is not None:
            self.load(Path(spec.init_path))
        else:
            self._initialise()

    def _views(self, flat: torch.Tensor, key: tuple[int, str]) -> LoraGroup:
        layer_name = key[1]
        widths = self._model.linear_shapes()[layer_name].out_features
        a, *b = self._layout[key]
        views = [flat[offset : offset + s.numel()].view(s) for _, s, offset in (a, *b)]
        columns = []
        for target, _, _ in b:
            index = LORA_GROUPS[layer_name].index(target)
            start = sum(widths[:index])
            columns.append((start, start + widths[index]))
        return LoraGroup(views[0], tuple(views[1:]), tuple(columns), self.spec.scaling)

    def _initialise(self) -> None:
        """A as ``peft.tuners.lora.LoraLayer.reset_lora_parameters`` does (Kaiming), B zero."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        for group in self._groups.values():
            r = self.spec.r
            for i in range(len(group.b)):
                torch.nn.init.kaiming_uniform_(
                    group.a[i * r : (i + 1) * r], a=math.sqrt(5), generator=generator
                )

    # -- the backward's view: LoraMatrices ---------------------------------------------------

    def group(self, layer: int, name: str) -> LoraGroup | None:
        return self._groups.get((layer, name))

    def group_at(self, path: str) -> LoraGroup | None:
        """Like :meth:`group`, by the path of the merged linear in the model."""
        for layer, name in self._groups:
            if self._model.module_path(layer, name) == path:
                return self._groups[layer, name]
        return None

    def grad(self, layer: int, name: str) -> LoraGroup:
        return self._pack_groups[layer, name]

    # -- gradients and steps -----------------------------------------------------------------

    def discard_pack_gradients(self) -> None:
        """Forgets what a pack has accumulated; it will be redone."""
        self._pack_grads.zero_()

    def commit_pack_gradients(self) -> None:
        """Adds a finished pack to the batch. Only whole packs count, so that a pack that is
        dropped half-way and redone is not counted twice."""
        self._grads.add_(self._pack_grads)
        self._pack_grads.zero_()

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clips (as ``torch.nn.utils.clip_grad_norm_``), steps AdamW, clears the gradients.

        Args:
            learning_rate: of this step.
            max_grad_norm: 0 turns clipping off.

        Returns:
            The norm before clipping.

        Raises:
            FloatingPointError: the gradients are not finite; the weights are unchanged.
        """
        norm = float(torch.linalg.vector_norm(self._grads))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}; the weights were not changed")
        if max_grad_norm > 0:
            self._grads.mul_(min(1.0, max_grad_norm / (norm + 1e-6)))
        with torch.inference_mode(False):
            self._weights.grad = self._grads
            self._optimizer.param_groups[0]["lr"] = learning_rate
            self._optimizer.step()
        self._grads.zero_()
        return norm

    # -- PEFT names --------------------------------------------------------------------------

    def matrices(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Path of each target linear in the model -> its A ``[r, in]`` and B ``[out, r]``."""
        return self._by_target(self._groups)

    def pack_gradients(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Like :meth:`matrices`, the gradients accumulated by the current pack."""
        return self._by_target(self._pack_groups)

    def gradients(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Like :meth:`matrices`, the gradients of the finished packs of the batch."""
        return self._by_target({key: self._views(self._grads, key) for key in self._layout})

    def snapshot(self) -> "AdapterSnapshot":
        """A copy of weights and moments; any thread may take it, between two steps."""
        state = self._optimizer.state.get(self._weights, {})
        # numpy copies without torch's threads, which belong to the forward.
        flat = torch.from_numpy(self._weights.detach().numpy().copy())
        optimizer = {
            name: torch.from_numpy(value.detach().numpy().copy()) for name, value in state.items()
        }
        matrices = self._by_target({key: self._views(flat, key) for key in self._layout})
        return AdapterSnapshot(self.spec, matrices, optimizer)

    def _load_optimizer(self, folder: Path) -> None:
        """Takes the moments of a checkpoint; one from before the first step has none.

        Raises:
            ValueError: they are of an adapter of another size.
        """
        state = load_file(folder / OPTIMIZER_FILE)
        if not state:
            return
        if state["exp_avg"].shape != self._weights.shape:
            raise ValueError(
                f"the checkpoint {folder.name} holds {state['exp_avg'].numel()} parameters, the "
                f"adapter has {self._weights.numel()}"
            )
        with torch.inference_mode(False):
            self._optimizer.state[self._weights] = {
                name: value.clone() for name, value in state.items()
            }

    def _by_target(
        self, groups: dict[tuple[int, str], LoraGroup]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        r = self.spec.r
        for (layer, name), group in groups.items():
            for i, (target, _, _) in enumerate(self._layout[layer, name][1:]):
                path = self._model.module_path(layer, target)
                found[path] = (group.a[i * r : (i + 1) * r], group.b[i])
        return found

    def load(self, folder: Path) -> None:
        """Takes the matrices of a PEFT folder.

        Raises:
            ValueError: its matrices are not those of this adapter (ranks, targets, layers).
        """
        tensors = load_file(folder / ADAPTER_FILES[1])
        for path, pair in self.matrices().items():
            for letter, matrix in zip("AB", pair, strict=True):
                key = f"{PEFT_PREFIX}{path}.lora_{letter}.weight"
                if key not in tensors:
                    raise ValueError(f"the adapter to continue from lacks {key}")
                loaded = tensors.pop(key)
                if loaded.shape != matrix.shape:
                    raise ValueError(
                        f"{key} of the adapter to continue from is {tuple(loaded.shape)}, "
                        f"expected {tuple(matrix.shape)}"
                    )
                matrix.copy_(loaded)
        if tensors:
            raise ValueError(
                f"the adapter to continue from also trains {next(iter(tensors))}, which this job "
                "does not target"
            )
