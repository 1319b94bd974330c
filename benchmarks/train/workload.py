"""What is trained: the batches, and the adapter that every system starts from."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.train.systems import Example
from flexllm_vllm.data.records import read_records
from flexllm_vllm.data.tokenize import ExampleTokenizer
from flexllm_vllm.jobs.types import TARGET_MODULES, LoraSpec

R = 16
LORA = LoraSpec(r=R, lora_alpha=2 * R)


def synthetic(length: int, count: int, batch: int = 1, seed: int = 0) -> list[list[Example]]:
    """Batches of random tokens that all carry loss, as a pretraining-like worst case."""
    rng = random.Random(seed)

    def one() -> Example:
        return [rng.randrange(100, 40_000) for _ in range(length)], [0] + [1] * (length - 1)

    return [[one() for _ in range(batch)] for _ in range(count)]


def chat_batches(path: Path, model: str, batch: int, count: int) -> list[list[Example]]:
    """Batches of a chat file, tokenised as the server does, in the order of the file."""
    from transformers import AutoTokenizer

    tokenizer = ExampleTokenizer(AutoTokenizer.from_pretrained(model))
    examples: list[Example] = []
    for line, record in itertools.islice(read_records(path, "supervised"), batch * count):
        ids, mask = tokenizer.encode(line, record)
        examples.append((list(ids), list(mask)))
    return [examples[i : i + batch] for i in range(0, batch * count, batch)]


def make_adapter(
    model: str, folder: Path, r: int = R, targets: Sequence[str] = TARGET_MODULES
) -> Path:
    """The adapter that both start from: B is not zero, so that all gradients are at work."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), task_type="CAUSAL_LM")
    peft = get_peft_model(base, config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    peft.save_pretrained(str(folder))
    return folder
