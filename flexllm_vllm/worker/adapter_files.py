"""PEFT folders on disk: what ``peft.PeftModel.from_pretrained`` and vLLM load."""

import importlib
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from flexllm_vllm.checkpoints import ADAPTER_FILES, OPTIMIZER_FILE, sync, write_state
from flexllm_vllm.worker.adapter import PEFT_PREFIX, AdapterSnapshot


def prepare() -> None:
    """Imports what saving needs, which takes a second: by the first checkpoint, with requests
    beside it, their iterations took three times as long meanwhile. Only a process that saves needs
    it."""
    importlib.import_module("peft")


def save_adapter(
    snapshot: AdapterSnapshot, folder: Path, base_model: str, state: dict[str, Any] | None = None
) -> None:
    """Writes a PEFT folder and, with a ``state``, all of a checkpoint; whole or not at all.

    The folder appears under its name only when it is complete and on disk.

    Args:
        snapshot: of the adapter.
        folder: must not exist yet, or is replaced.
        base_model: recorded as ``base_model_name_or_path``.
        state: of the training loop (see :mod:`flexllm_vllm.checkpoints`).

    Raises:
        OSError: no space is left, or the like; nothing stays of it.
    """
    from peft import LoraConfig  # see prepare()

    snapshot.copied.wait()
    spec = snapshot.spec
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
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
            f"{PEFT_PREFIX}{path}.lora_{letter}.weight": matrix.cpu().contiguous().clone()
            for path, pair in snapshot.matrices.items()
            for letter, matrix in zip("AB", pair, strict=True)
        }
        save_file(tensors, temporary / ADAPTER_FILES[1], metadata={"format": "pt"})
        if state is not None:
            optimizer = {name: value.cpu() for name, value in snapshot.optimizer.items()}
            save_file(optimizer, temporary / OPTIMIZER_FILE)
            write_state(temporary, state)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
