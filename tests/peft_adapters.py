"""Adapters that PEFT itself has written, for a tiny random Llama, and archives of them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TINY_LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=64,
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(config: LlamaConfig = TINY_LLAMA) -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def save_random_adapter(
    folder: Path, seed: int = 1, model: LlamaConfig = TINY_LLAMA, **options: Any
) -> Path:
    """A PEFT folder with random A and B, as ``PeftModel.save_pretrained`` writes it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(tiny_llama(model), LoraConfig(**{**settings, **options}))
    torch.manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    peft_model.peft_config["default"].base_model_name_or_path = "org/tiny"
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits(folder: Path) -> torch.Tensor:
    """What the tiny Llama says with an adapter, loaded by PEFT."""
    model = PeftModel.from_pretrained(tiny_llama(), str(folder))
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits


def archive_of(folder: Path, prefix: str = "") -> bytes:
    """A ``tar.gz`` of a folder's files, as ``tar`` makes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, prefix + path.name)
    return stream.getvalue()
