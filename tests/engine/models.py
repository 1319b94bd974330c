"""Models for the engine tests: small random ones, and adapters to start from."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCAB = 320


def random_model(folder: Path, *, heads: int, kv_heads: int, head_dim: int, inner: int,
                 tied: bool, family: str = "llama", hidden: int | None = None, layers: int = 3,
                 seed: int = 0, positions: int = 1024, sliding_window: int | None = None,
                 **config_values: Any) -> Path:  # fmt: skip
    """A model with random float32 weights and a tokenizer of one word per token id.

    ``family`` is transformers' ``model_type``; ``hidden`` is ``heads * head_dim`` by default;
    ``config_values`` are others of its configuration.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=hidden or heads * head_dim,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **config_values,
    )
    if sliding_window is not None or family == "mistral":
        config.sliding_window = sliding_window
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(folder)
    return folder


def first_layers(model: Path, folder: Path, count: int) -> Path:
    """A model cut short: it compiles in a fraction of the time, and its text means nothing."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    layer = re.compile(r"model\.layers\.(\d+)\.")
    weights = {
        name: x
        for name, x in load_file(file).items()
        if (found := layer.match(name)) is None or int(found[1]) < count
    }
    save_file(weights, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = count
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_adapter(
    model: Path,
    folder: Path,
    r: int = 8,
    targets: Sequence[str] = ALL_TARGETS,
    seed: int = 0,
    layers: list[int] | None = None,
    scale: float = 0.02,
) -> Path:
    """A PEFT adapter whose B is not zero, so that the gradients of A are not; its elements have
    a standard deviation of ``scale``."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=list(targets),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(base, config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)
    peft.save_pretrained(str(folder))
    return folder


def random_examples(
    lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB
) -> list[tuple[list[int], list[int]]]:
    """Token ids and loss masks; about two thirds of the tokens carry loss."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.66).int().tolist()
        mask[0], mask[-1] = 0, 1
        examples.append((ids, mask))
    return examples
