"""Archives and PEFT folders with random damage: accepted or refused, nothing else."""

import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_adapters import TINY_LLAMA, save_random_adapter

from flexllm_vllm.adapter_files.archive import extract_adapter
from flexllm_vllm.adapter_files.base_linears import base_linears
from flexllm_vllm.adapter_files.check import check_adapter, name_targets
from flexllm_vllm.adapter_files.errors import AdapterFileError

BASE = base_linears(TINY_LLAMA)
FUZZ = settings(max_examples=100, deadline=None, derandomize=True)
FILES = ("adapter_config.json", "adapter_model.safetensors")
Edits = list[tuple[int, bytes]]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


def edits(size: int) -> st.SearchStrategy[Edits]:
    """Places, and what is written there."""
    return st.lists(
        st.tuples(st.integers(0, size - 1), st.binary(min_size=1, max_size=12)), max_size=6
    )


def edited(content: bytes, changes: Edits) -> bytes:
    damaged = bytearray(content)
    for place, data in changes:
        damaged[place : place + len(data)] = data
    return bytes(damaged)


@pytest.fixture(scope="module")
def source() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield save_random_adapter(Path(folder), r=2, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def tar(source: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(source, "é" * 60)  # with extended headers
    return stream.getvalue()


def bring(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "a" / "b"
        target.mkdir(parents=True)
        with suppress(AdapterFileError):
            extract_adapter(io.BytesIO(content), target, 1 << 20)
            name_targets(target, check_adapter(target, BASE, 8), BASE)
        assert {path.name for path in target.iterdir()} <= set(FILES)
        assert [path.name for path in Path(folder).iterdir()] == ["a"]
        assert [path.name for path in target.parent.iterdir()] == ["b"]


@FUZZ
@given(data=st.data())
def test_a_damaged_archive(tar: bytes, data: Any) -> None:
    headers = [i for i in range(0, len(tar), 512) if tar[i + 257 : i + 262] == b"ustar"]
    start = data.draw(st.sampled_from(headers))
    block = edited(tar[start : start + 1024], data.draw(edits(1024)))
    damaged = bytearray(tar)
    damaged[start : start + 1024] = block
    if data.draw(st.booleans()):  # with the right checksum it goes further
        header = bytearray(damaged[start : start + 512])
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        damaged[start : start + 512] = header
    bring(gzip.compress(bytes(damaged[: data.draw(st.integers(start, len(damaged)))]), 1))


@FUZZ
@given(data=st.data())
def test_damaged_gzip(tar: bytes, data: Any) -> None:
    packed = gzip.compress(tar)
    bring(edited(packed, data.draw(edits(len(packed)))))


@FUZZ
@given(data=st.data())
def test_damaged_weights(source: Path, data: Any) -> None:
    weights = (source / FILES[1]).read_bytes()
    length = int.from_bytes(weights[:8], "little")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILES[0]).write_bytes((source / FILES[0]).read_bytes())
        damaged = edited(weights, data.draw(edits(8 + length)))
        (Path(folder) / FILES[1]).write_bytes(damaged)
        with suppress(AdapterFileError):
            check_adapter(Path(folder), BASE, 8)


@FUZZ
@given(name=st.sampled_from([
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "init_lora_weights", "bias", "peft_type", "use_rslora", "something",
]), value=json_values)  # fmt: skip
def test_any_setting(source: Path, name: str, value: Any) -> None:
    config = json.loads((source / FILES[0]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILES[0]).write_text(json.dumps({**config, name: value}))
        (Path(folder) / FILES[1]).write_bytes((source / FILES[1]).read_bytes())
        with suppress(AdapterFileError):
            name_targets(Path(folder), check_adapter(Path(folder), BASE, 8), BASE)
            check_adapter(Path(folder), BASE, 8)
