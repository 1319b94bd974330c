"""Operations without the dispatcher, as a compiled graph calls them."""

import pytest
import torch

from flexllm_vllm.patches import cpu_adapter_graph, cpu_linear_weights, direct_operations
from flexllm_vllm.worker.cpu import call_operations_directly

_library = torch.library.Library("flexllm_test", "FRAGMENT")
_library.define("double(Tensor x) -> Tensor")
_library.impl("double", lambda x: 2 * x, "CPU")
_library._register_fake("double", torch.empty_like)

OURS = torch.ops.flexllm_test


@pytest.fixture(autouse=True)
def _restored():
    yield
    direct_operations.restore()


def test_a_graph_calls_the_function_itself() -> None:
    called = []
    direct_operations.call_directly("flexllm_test", double=lambda x: called.append(x) or 2 * x)
    assert OURS.double.default(torch.ones(1)).item() == 2
    assert len(called) == 1
    # The operation itself is as it was.
    assert OURS.double(torch.ones(1)).item() == 2
    assert len(called) == 1


def test_what_is_restored_can_be_traced() -> None:
    overload = OURS.double.default
    direct_operations.call_directly("flexllm_test", double=lambda x: x)
    direct_operations.call_directly("flexllm_test", double=lambda x: 3 * x)
    direct_operations.restore()
    assert OURS.double.default is overload
    with torch._subclasses.FakeTensorMode():
        assert OURS.double.default(torch.empty(3)).shape == (3,)


def test_the_worker_s_graphs_find_the_functions_that_the_operations_run() -> None:
    from vllm.model_executor.layers.attention import attention

    call_operations_directly()
    ours, theirs = torch.ops.flexllm_vllm, torch.ops.vllm
    assert ours.packed_linear.default is cpu_linear_weights.packed_linear
    assert ours.add_adapters.default is cpu_adapter_graph.add_adapters
    assert ours.capture.default is cpu_adapter_graph.hand_over
    for name in ("unified_attention_with_output", "unified_kv_cache_update"):
        assert getattr(theirs, name).default is getattr(attention, name)
