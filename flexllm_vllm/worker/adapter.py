"""A LoRA adapter in training: float32 master weights, gradients, AdamW."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from flexllm_vllm.checkpoints import ADAPTER_FILES, OPTIMIZER_FILE
from flexllm_vllm.kernels.adamw import adamw
from flexllm_vllm.kernels.lora import LoraGroup
from flexllm_vllm.models.base import ModelBackward, TrainedLinears
from flexllm_vllm.plan import TrainAdapter
from flexllm_vllm.worker.flat_layout import FlatLayout, Matrices
from flexllm_vllm.worker.transfer import DeviceWork

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSnapshot:
    """What an adapter was at one moment.

    Attributes:
        spec: of the adapter.
        matrices: as of :meth:`TrainableAdapter.matrices`.
        optimizer: AdamW's state, empty before the first step.
        copied: the copies that it is made of.
    """

    spec: TrainAdapter
    matrices: Matrices
    optimizer: dict[str, torch.Tensor]
    copied: DeviceWork


class TrainableAdapter:
    """All matrices of an adapter lie in one flat buffer, so that clipping and AdamW are a few
    operations whatever the number of layers; the matrices are views of it.

    With tensor parallelism each rank has its part (:class:`FlatLayout`), and the methods marked
    collective must be called by every rank.

    Attributes:
        spec: what the job asked for.
        trained: the linears that have matrices.

    Raises:
        ValueError: ``layers_to_transform`` names a layer that the model does not have.
    """

    def __init__(self, spec: TrainAdapter, model: ModelBackward) -> None:
        self.spec = spec
        self._parallel = model.parallel
        self._layout = layout = FlatLayout(spec, model)
        self._paths = {model.module_path(*key): key for key in layout.keys}
        self.trained = TrainedLinears(layout.keys)
        # Plain tensors: vLLM runs the worker in inference mode, whose tensors cannot be updated
        # outside of it.
        with torch.inference_mode(False):
            zeros = [torch.zeros(layout.size, device=model.device) for _ in range(5)]
        self._weights, self._grads, self._pack_grads, self._exp_avg, self._exp_avg_sq = zeros
        self._num_steps = 0
        self._groups = layout.groups(self._weights)
        self._pack_groups = layout.groups(self._pack_grads)
        if spec.resume_path is not None:
            self.load(Path(spec.resume_path))
            self._load_optimizer(Path(spec.resume_path))
        elif spec.init_path is not None:
            self.load(Path(spec.init_path))
        else:
            self._initialise()

    def _initialise(self) -> None:
        """A as ``peft.tuners.lora.LoraLayer.reset_lora_parameters`` does (Kaiming), B zero."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        whole = torch.zeros(self._layout.whole_size)
        for a, _ in self._layout.matrices(whole).values():
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self._weights.copy_(self._layout.shard(whole))

    # -- the backward's view: LoraMatrices ---------------------------------------------------

    def group(self, layer: int, name: str) -> LoraGroup | None:
        return self._groups.get((layer, name))

    def group_at(self, path: str) -> LoraGroup | None:
        """Like :meth:`group`, by the path of the merged linear in the model."""
        key = self._paths.get(path)
        return None if key is None else self._groups[key]

    def slices_at(self, path: str) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of the merged linear there: the place of each target in it, its A and its B."""
        key = self._paths.get(path)
        if key is None:
            return []
        group, r = self._groups[key], self.spec.r
        return [
            (index, group.a[i * r : (i + 1) * r], group.b[i])
            for i, index in enumerate(self._layout.slices(key))
        ]

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

    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        """Clips (as ``torch.nn.utils.clip_grad_norm_``), steps AdamW, clears the gradients.

        Collective. Where the gradients are not finite the weights stay as they are.

        Args:
            learning_rate: of this step.
            max_grad_norm: 0 turns clipping off.

        Returns:
            The norm before clipping, a scalar on the device.
        """
        self._sum_replicated(self._grads)
        norm = self._norm()
        spec = self.spec
        self._num_steps += 1
        adamw(
            self._weights, self._grads, self._exp_avg, self._exp_avg_sq, norm, self._num_steps,
            learning_rate, spec.betas, spec.eps, spec.weight_decay, max_grad_norm,
        )  # fmt: skip
        self._grads.zero_()
        return norm

    def _sum_replicated(self, grads: torch.Tensor) -> None:
        """Sums what each rank has of the gradients of the matrices that all of them hold."""
        count = self._layout.num_replicated
        if count:
            grads[:count] = self._parallel.all_reduce(grads[:count].clone())

    def _norm(self) -> torch.Tensor:
        """Of the whole adapter's gradients."""
        count = self._layout.num_replicated
        own = torch.linalg.vector_norm(self._grads[count:])
        if not count:
            return own
        squared = self._parallel.all_reduce_small(own.square(), torch.distributed.ReduceOp.SUM)
        return (squared + torch.linalg.vector_norm(self._grads[:count]).square()).sqrt()

    # -- PEFT names --------------------------------------------------------------------------

    def matrices(self) -> Matrices:
        """Path of each target linear in the model -> its A ``[r, in]`` and B ``[out, r]``, whole.

        Collective. With one rank they are views; so it is below.
        """
        return self._layout.matrices(self._layout.gather(self._weights))

    def pack_gradients(self) -> Matrices:
        """Like :meth:`matrices`, the gradients accumulated by the current pack."""
        return self._whole_gradients(self._pack_grads)

    def gradients(self) -> Matrices:
        """Like :meth:`matrices`, the gradients of the finished packs of the batch."""
        return self._whole_gradients(self._grads)

    def _whole_gradients(self, grads: torch.Tensor) -> Matrices:
        if self._layout.num_replicated:
            grads = grads.clone()
            self._sum_replicated(grads)
        return self._layout.matrices(self._layout.gather(grads))

    def snapshot(self) -> "AdapterSnapshot":
        """A copy of weights and moments. Collective; with one rank any thread may take it, between
        two steps."""
        gather, copy = self._layout.gather, _copy
        if self._parallel.size > 1:
            copy = torch.Tensor.cpu  # a whole adapter a rank is too much for a device to keep
        optimizer = {}
        if self._num_steps:
            # The form of ``torch.optim.AdamW``'s state.
            optimizer = {
                "exp_avg": copy(gather(self._exp_avg)),
                "exp_avg_sq": copy(gather(self._exp_avg_sq)),
                "step": torch.tensor(float(self._num_steps)),
            }
        whole = copy(gather(self._weights))
        copied = DeviceWork(self._weights.device)
        return AdapterSnapshot(self.spec, self._layout.matrices(whole), optimizer, copied)

    def _load_optimizer(self, folder: Path) -> None:
        """Takes the moments of a checkpoint; one from before the first step has none.

        Raises:
            ValueError: they are of an adapter of another size.
        """
        state = load_file(folder / OPTIMIZER_FILE)
        if not state:
            return
        size = self._layout.whole_size
        if state["exp_avg"].numel() != size:
            raise ValueError(
                f"the checkpoint {folder.name} holds {state['exp_avg'].numel()} parameters, the "
                f"adapter has {size}"
            )
        self._exp_avg.copy_(self._layout.shard(state["exp_avg"]))
        self._exp_avg_sq.copy_(self._layout.shard(state["exp_avg_sq"]))
        self._num_steps = int(state["step"])

    def load(self, folder: Path) -> None:
        """Takes the matrices of a PEFT folder.

        Raises:
            ValueError: its matrices are not those of this adapter (ranks, targets, layers).
        """
        tensors = load_file(folder / ADAPTER_FILES[1])
        whole = torch.empty(self._layout.whole_size)
        for path, pair in self._layout.matrices(whole).items():
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
        self._weights.copy_(self._layout.shard(whole))


def _copy(x: torch.Tensor) -> torch.Tensor:
    """On the host by numpy, without torch's threads, which belong to the forward."""
    if x.device.type != "cpu":
        return x.clone()
    return torch.from_numpy(x.numpy().copy())
