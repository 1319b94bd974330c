"""PEFT folders on disk: what ``peft.PeftModel.from_pretrained`` and vLLM load."""

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from flexllm_vllm.worker.adapter import PEFT_PREFIX, TrainableAdapter


def save_adapter(adapter: TrainableAdapter, folder: Path, base_model: str) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, whole or not at all.

    The folder appears under its name only when it is complete and on disk.

    Args:
        adapter: the adapter.
        folder: must not exist yet, or is replaced.
        base_model: recorded as ``base_model_name_or_path``.
    """
    # peft takes a second to import, and only a process that saves needs it.
    from peft import LoraConfig

    spec = adapter.spec
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        use_rslora=spec.use_rslora,
        target_modules=list(spec.target_modules),
        layers_to_transform=spec.layers_to_transform and list(spec.layers_to_transform),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(temporary))
    tensors = {
        f"{PEFT_PREFIX}{path}.lora_{letter}.weight": matrix.contiguous().clone()
        for path, pair in adapter.matrices().items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
