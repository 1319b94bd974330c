"""Building the CPU kernels: cached, safe against races, and replaced by torch where impossible."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flexllm_vllm.kernels import native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_several_builders_leave_one_library(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        built = set(pool.map(native.build, [tmp_path / "kernels"] * 3))
    assert len(built) == 1
    assert list((tmp_path / "kernels").iterdir()) == list(built)


@needs_compiler
def test_a_built_library_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = native.build(tmp_path)
    monkeypatch.setattr(native.subprocess, "run", None)
    assert native.build(tmp_path) == built


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        native.build(Path("unused"))


@needs_compiler
def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-not-a-flag"))
    with pytest.raises(RuntimeError, match="not-a-flag"):
        native.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_dtypes_are_left_to_torch() -> None:
    x = torch.zeros(2, 4, dtype=torch.float16)
    assert not native.call("rms_norm", x, x[0], 2, 4, 1e-5, x)
