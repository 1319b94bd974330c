"""From a user's JSONL file to token ids and loss masks in a reproducible order."""

from flexllm_vllm.data.dataset import TokenizedDataset
from flexllm_vllm.data.errors import DataError, UnsupportedTokenizerError
from flexllm_vllm.data.order import batches, num_steps
from flexllm_vllm.data.preferences import tokenize_preferences
from flexllm_vllm.data.records import Method, check_file
from flexllm_vllm.data.tokenize import ExampleTokenizer, TokenizationReport, tokenize_file

__all__ = [
    "DataError",
    "ExampleTokenizer",
    "Method",
    "TokenizationReport",
    "TokenizedDataset",
    "UnsupportedTokenizerError",
    "batches",
    "check_file",
    "num_steps",
    "tokenize_file",
    "tokenize_preferences",
]
