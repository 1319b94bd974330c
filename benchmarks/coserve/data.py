"""What is trained: one file for every system."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

LENGTH = 512
BATCH = 4
EXAMPLES = 128


def write_examples(source: Path | None, model: str, target: Path, seed: int) -> None:
    """Writes JSONL: the first :data:`EXAMPLES` of a file, or synthetic ones."""
    if source is None:
        from transformers import AutoTokenizer

        lines = _synthetic(AutoTokenizer.from_pretrained(model), seed)
    else:
        with source.open() as stream:
            wanted = (line.strip() for line in stream)
            lines = list(itertools.islice((line for line in wanted if line), EXAMPLES))
    target.write_text("\n".join(lines) + "\n")


def _synthetic(tokenizer: Any, seed: int) -> list[str]:
    """Random words, each one token, all of them loss-bearing: the prompt is empty."""
    rng = random.Random(seed)
    words = {tokenizer.decode([i]) for i in range(100, min(len(tokenizer), 40_000))}
    words = {w for w in words if w.startswith(" ") and w[1:].isascii() and w[1:].islower()}
    single = sorted(w for w in words if len(tokenizer(w, add_special_tokens=False).input_ids) == 1)
    return [
        # The end-of-sequence token is the last one.
        json.dumps({"prompt": "", "completion": "".join(rng.choices(single, k=LENGTH - 1))})
        for _ in range(EXAMPLES)
    ]


def micro_batches(file: Path, model: str) -> list[list[tuple[list[int], list[int]]]]:
    """The examples as the server tokenises them, in batches of one: nothing is padded."""
    from benchmarks.train.workload import chat_batches

    count = sum(1 for line in file.read_text().splitlines() if line)
    return [
        [(ids[:LENGTH], mask[:LENGTH]) for ids, mask in batch]
        for batch in chat_batches(file, model, 1, count)
    ]
