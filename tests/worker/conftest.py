from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_gpu import GPU, Unread
from torch._subclasses import FakeTensorMode

from flexllm_vllm.kernels.cross_entropy import release_buffers
from flexllm_vllm.models.parallel import TensorParallel
from flexllm_vllm.worker import activation_cache, adapter, packs, readings, trainer


def _step_without_reading(weights: Any, gradients: Any, *rest: Any) -> None:
    """In place of the fused AdamW, a Triton kernel."""
    tensors = [weights, gradients, *(x for x in rest if isinstance(x, torch.Tensor))]
    assert {x.device for x in tensors} == {GPU}
    assert len(tensors) == 5


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are fake, and those of training lie on a device that is not the host."""
    for module in (packs, activation_cache, trainer):
        monkeypatch.setattr(module, "to_device", lambda x, device: x.to(device))
    monkeypatch.setattr(readings, "HostCopy", Unread)
    monkeypatch.setattr(adapter, "adamw", _step_without_reading)
    monkeypatch.setattr(TensorParallel, "of_this_worker", classmethod(lambda cls: cls()))
    with FakeTensorMode(), torch.inference_mode():
        yield
    release_buffers()
