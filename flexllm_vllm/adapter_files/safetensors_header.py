"""The header of a safetensors file, read without the tensors.

https://huggingface.co/docs/safetensors/index#format: 8 bytes with the length of the header, the
header (a JSON object), the tensors one after the other.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_vllm.adapter_files.errors import AdapterFileError

# A tensor takes about 150 bytes: this is enough for adapters of some ten thousand layers.
MAX_HEADER_BYTES = 16 << 20
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file. ``dtype`` is safetensors' name of it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of all tensors.

    Raises:
        AdapterFileError: the header is malformed, a dtype is no floating-point one that vLLM loads,
            or the tensors do not fill the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _malformed(
                f"its header has {length} bytes, at most {MAX_HEADER_BYTES} are allowed and the "
                f"file has {size}"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise _malformed(f"its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise _malformed("its header is no object")
    header.pop("__metadata__", None)
    spans, tensors = [], {}
    for name, entry in header.items():
        tensors[name], span = _tensor(name, entry)
        spans.append(span)
    _check_spans(spans, size - 8 - length)
    return tensors


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    where = f"tensor '{name[:200]}'"
    if not isinstance(entry, dict):
        raise _malformed(f"{where} has no dtype, shape and data_offsets")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        allowed = ", ".join(_DTYPE_BYTES)
        raise _malformed(f"{where} has the dtype {str(dtype)[:20]!r}, allowed: {allowed}")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise _malformed(f"{where} has no valid shape and data_offsets")
    if span[1] - span[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise _malformed(f"{where} has {span[1] - span[0]} bytes, {dtype}{shape} has others")
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    )


def _check_spans(spans: list[tuple[int, int]], size: int) -> None:
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise _malformed("its tensors overlap, or leave gaps")
        end = last
    if end != size:
        raise _malformed(f"its tensors have {end} bytes, the file holds {size} of them")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _malformed(reason: str) -> AdapterFileError:
    return AdapterFileError(f"adapter_model.safetensors cannot be read: {reason}")
