"""The Triton kernels in Triton's interpreter, which must be chosen before Triton is imported: these
tests run in a process of their own (``tests/triton/test_interpreter.py`` starts it). Where there is
a GPU they run on it as well."""

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import bfloat16

    bfloat16.install()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """On which tensors are made."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield
        return
    with torch.device("cuda"):
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN: what a kernel does not write is seen."""
    empty_like, empty, new_empty = torch.empty_like, torch.empty, torch.Tensor.new_empty

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-7)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
        patch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
        yield
