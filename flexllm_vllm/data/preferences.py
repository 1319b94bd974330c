"""Preference pairs to token ids and loss masks, two examples a pair."""

from pathlib import Path

from flexllm_vllm.data.dataset import DatasetBuilder, TokenizedDataset
from flexllm_vllm.data.records import read_records
from flexllm_vllm.data.tokenize import ExampleTokenizer, TokenizationReport, report_on


def tokenize_preferences(
    path: Path, tokenizer: ExampleTokenizer, max_seq_length: int
) -> tuple[TokenizedDataset, TokenizationReport]:
    """Tokenize a JSONL file for the method ``dpo``.

    Pair ``i`` is the examples ``2i`` (preferred) and ``2i + 1`` (not preferred). Each is its
    prompt's tokens, the same for both, and its output's, of which the assistant's carry loss.

    Examples longer than ``max_seq_length`` tokens are truncated at their end. A pair is skipped if
    one of its sides then has no token with loss, or both are the same. The report counts pairs.

    Raises:
        DataError: a line is invalid, the file is empty, or no pair remains.
    """
    builder = DatasetBuilder()
    truncated = skipped = 0
    for line, record in read_records(path, "dpo"):
        pair = tokenizer.encode_pair(line, record)
        cut = [(ids[:max_seq_length], mask[:max_seq_length]) for ids, mask in pair]
        if not all(any(mask) for _, mask in cut) or cut[0][0] == cut[1][0]:
            skipped += 1
            continue
        truncated += any(len(ids) > max_seq_length for ids, _ in pair)
        for ids, mask in cut:
            builder.add(ids, mask)
    dataset = builder.build()
    return dataset, report_on(dataset, len(dataset) // 2, truncated, skipped, max_seq_length)
