"""Training adapters in vLLM's LoRA slots.

The weights are rewritten in place after each optimizer step, both in the slot and in the CPU copy
that vLLM's LRU cache would reload it from; and the adapter is pinned, so that adapters being
served never evict it. It has no name in the API: a rewritten slot must not meet cached prefixes.

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
        dtype: of the slots.
    """

    def __init__(self, manager: Any, dtype: torch.dtype) -> None:
        self._manager = manager
        self._dtype = dtype
        self._models: dict[int, LoRAModel] = {}
        self._copies: dict[int, dict[str, LoRALayerWeights]] = {}
        self._uses_masters = dtype == torch.float32

    def add(self, adapter: TrainableAdapter) -> None:
        """Registers the adapter, pins it, and writes its slot."""
        spec = adapter.spec
        copies = {
            path: LoRALayerWeights(
                module_name=path,
                rank=spec.r,
                lora_alpha=spec.r,
                lora_a=torch.empty(a.shape, dtype=self._dtype),
                lora_b=torch.empty(b.shape, dtype=self._dtype),
            )
            for path, (a, b) in adapter.matrices().items()
        }
        model = LoRAModel(spec.lora_int_id, spec.r, dict(copies))
        if len(self._manager) + 1 > self._manager.capacity:
            self._manager.remove_oldest_adapter()
        self._manager.add_adapter(model)
        self._models[spec.lora_int_id] = model
        self._copies[spec.lora_int_id] = copies
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
        """Brings the slot and its CPU copy up to the adapter's weights, where they are read."""
        if not self._uses_masters:
            self._write(adapter)

    def _write(self, adapter: TrainableAdapter) -> None:
        int_id = adapter.spec.lora_int_id
        copies = self._copies[int_id]
        for path, (a, b) in adapter.matrices().items():
            copies[path].lora_a.copy_(a)
            # vLLM's kernels know no scaling: it is merged into B.
            copies[path].lora_b.copy_(b * adapter.spec.scaling)
        slot = self._slot(int_id)
        model = self._models[int_id]
        for name, module in self._manager.modules.items():
            weights = model.get_lora(name)
            if weights is not None:
                module.set_lora(slot, weights.lora_a, weights.lora_b)

    def remove(self, int_id: int) -> None:
        """Frees the slot."""
        if self._models.pop(int_id, None) is not None:
            self._copies.pop(int_id)
            slot = self._slot(int_id)
            for wrapper in self._manager.punica_wrapper_mapping.values():
                products = wrapper.__dict__.get("slot_products", {})
                for key in [key for key in products if key[1] == slot]:
                    del products[key]
            self._manager.remove_adapter(int_id)


def _add(group: LoraGroup, y: torch.Tensor, x: torch.Tensor) -> None:
    lora_add(y, x, group)
