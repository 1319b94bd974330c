"""Training adapters in vLLM's LoRA slots.

The slot is rewritten in place after each optimizer step; vLLM knows of an adapter without weights,
which it would find nowhere else, and the adapter is pinned, so that adapters being served never
evict it. It has no name in the API: a rewritten slot must not meet cached prefixes.

In float32 on CPU the forward multiplies by the master weights themselves, one product ``x A^T`` for
all targets that share ``x``; nothing has to be rewritten then.
"""

from functools import partial
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from flexllm_vllm.kernels.lora import LoraGroup, lora_add
from flexllm_vllm.worker.adapter import TrainableAdapter


class TrainingSlots:
    """Puts trainable adapters into the slots of vLLM's LoRA manager.

    Args:
        manager: ``vllm.lora.model_manager.LRUCacheLoRAModelManager``.
        dtype, device: of the slots.
    """

    def __init__(self, manager: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._manager = manager
        self._uses_masters = dtype == torch.float32 and device.type == "cpu"

    def add(self, adapter: TrainableAdapter) -> None:
        """Registers the adapter, pins it, and writes its slot."""
        spec = adapter.spec
        if len(self._manager) + 1 > self._manager.capacity:
            self._manager.remove_oldest_adapter()
        self._manager.add_adapter(_without_weights(spec.lora_int_id, spec.r))
        self._manager.activate_adapter(spec.lora_int_id)
        self._manager.pin_adapter(spec.lora_int_id)
        self._write(adapter)
        if self._uses_masters:
            slot = self._slot(spec.lora_int_id)
            for path, module in self._manager.modules.items():
                if (group := adapter.group_at(path)) is not None:
                    key = (module.lora_a_stacked[0].data_ptr(), slot)
                    products = module.punica_wrapper.__dict__.setdefault("slot_products", {})
                    products[key] = partial(_add, group)

    def _slot(self, int_id: int) -> int:
        return int(self._manager.lora_index_to_id.index(int_id))

    def write(self, adapter: TrainableAdapter) -> None:
        """Brings the slot up to the adapter's weights, where it is read."""
        if not self._uses_masters:
            self._write(adapter)

    def _write(self, adapter: TrainableAdapter) -> None:
        """This rank's part, as ``vllm/lora/layers/base_linear.py`` (``set_lora``) lays it out."""
        slot = self._slot(adapter.spec.lora_int_id)
        targets: list[torch.Tensor] = []
        matrices: list[torch.Tensor] = []
        # vLLM's kernels know no scaling: it is merged into B.
        places = self._manager.modules.items()
        slices = [(module, *s) for path, module in places for s in adapter.slices_at(path)]
        scaled = torch._foreach_mul([b for *_, b in slices], adapter.spec.scaling)
        for (module, index, a, b), b_scaled in zip(slices, scaled, strict=True):
            targets.append(module.lora_a_stacked[index][slot, 0, : a.shape[0], : a.shape[1]])
            targets.append(module.lora_b_stacked[index][slot, 0, : b.shape[0], : b.shape[1]])
            matrices += [a, b_scaled]
        torch._foreach_copy_(targets, matrices)

    def remove(self, int_id: int) -> None:
        """Frees the slot."""
        if int_id not in self._manager.list_adapters():
            return
        slot = self._slot(int_id)
        for wrapper in self._manager.punica_wrapper_mapping.values():
            products = wrapper.__dict__.get("slot_products", {})
            for key in [key for key in products if key[1] == slot]:
                del products[key]
        self._manager.remove_adapter(int_id)


def _without_weights(int_id: int, r: int) -> LoRAModel:
    """An adapter as vLLM registers it, with nothing for any module of the model.

    ``_create_merged_loras_inplace`` asks for at least one matrix.
    """
    nothing = LoRALayerWeights("in training", r, r, torch.empty(r, 0), torch.empty(0, r))
    return LoRAModel(int_id, r, {nothing.module_name: nothing})


def _add(group: LoraGroup, y: torch.Tensor, x: torch.Tensor, rows: slice | None) -> None:
    lora_add(y, x, group, rows)
