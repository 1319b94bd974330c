"""LoRA ops on CPU, against one matrix product for each row."""

import pytest
import torch
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from flexllm_vllm.patches import cpu_lora_ops
from flexllm_vllm.patches.cpu_lora_ops import segments

SLOTS, RANK, WIDTH = 3, 8, 24
OUT = (40, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    cpu_lora_ops.apply()


def wrapper(slots: list[int]) -> PunicaWrapperCPU:
    """A wrapper whose batch has these slots."""
    made = PunicaWrapperCPU(256, 64, "cpu")
    indices = torch.tensor(slots)
    made._token_lora_indices[: len(slots)] = indices
    made._sampler_indices[: len(slots)] = indices
    made.indices_len = [len(slots)] * 5
    made._token_segments = segments(made.token_lora_indices)
    made._sampler_segments = segments(made.sampler_indices)
    return made


def matrices(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH).to(dtype) for _ in OUT)
    b = tuple(torch.randn(SLOTS, 1, width, RANK).to(dtype) for width in OUT)
    return a, b


BATCHES = [
    [-1, -1, 2, 2, 2, -1, 0],
    [1, -1, 1, 0, 1, -1, 0, 0],
    [2],
    [0] * 9,
]


@pytest.mark.parametrize("slots", BATCHES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-1)])
def test_each_row_gets_its_own_adapter(slots: list[int], dtype: torch.dtype, bound: float) -> None:
    a, b = matrices(dtype)
    x = torch.randn(len(slots), WIDTH).to(dtype)
    y = torch.randn(len(slots), sum(OUT)).to(dtype)
    expected = y.double().clone()
    for row, slot in enumerate(slots):
        start = 0
        for a_i, b_i, width in zip(a, b, OUT, strict=True):
            if slot >= 0:
                delta = b_i[slot, 0].double() @ (a_i[slot, 0].double() @ x[row].double())
                expected[row, start : start + width] += delta
            start += width
    got = y.clone()
    wrapper(slots).add_lora_linear(got, x, a, b, 1.0, OUT)
    assert (got.double() - expected).abs().max() < bound * expected.abs().max()
    without = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(got[without], y[without])


@pytest.mark.parametrize("slots", BATCHES)
def test_shrink_and_expand_alone_are_the_same_product(slots: list[int]) -> None:
    a, b = matrices(torch.float32)
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), sum(OUT))
    both = y.clone()
    made = wrapper(slots)
    made.add_lora_linear(both, x, a, b, 1.0, OUT)
    buffer = tuple(torch.zeros(len(slots), RANK) for _ in OUT)
    made.add_shrink(buffer, x, a, 1.0)
    made.add_expand(y, buffer, b, OUT)
    torch.testing.assert_close(y, both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", BATCHES)
def test_logits(slots: list[int]) -> None:
    a, b = matrices(torch.float32)
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), OUT[0])
    expected = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row] += b[0][slot, 0] @ (a[0][slot, 0] @ x[row])
    wrapper(slots).add_lora_logits(y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_without_adapters_does_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("a product was computed")

    monkeypatch.setattr(torch, "matmul", refuse)
    a, b = matrices(torch.float32)
    y = torch.randn(4, sum(OUT))
    before = y.clone()
    wrapper([-1] * 4).add_lora_linear(y, torch.randn(4, WIDTH), a, b, 1.0, OUT)
    assert torch.equal(y, before)


def test_the_padding_of_a_known_rank_is_skipped() -> None:
    a, b = matrices(torch.float32)
    made = wrapper([1, 1])
    made.slot_ranks = {1: 4}
    x, y = torch.randn(2, WIDTH), torch.zeros(2, sum(OUT))
    made.add_lora_linear(y, x, a, b, 1.0, OUT)
    expected = x @ a[0][1, 0, :4].t() @ b[0][1, 0, :, :4].t()
    torch.testing.assert_close(y[:, : OUT[0]], expected, rtol=1e-4, atol=1e-4)


def test_stock_vllm_still_gives_rows_without_an_adapter_the_last_slots() -> None:
    """When this fails, vLLM has been mended and the patch needs to be fast only."""
    a, b = matrices(torch.float32)
    x = torch.randn(1, WIDTH)
    none = torch.tensor([-1])
    buffer, y = torch.zeros(1, RANK), torch.zeros(1, OUT[0])
    bgmv_shrink(x, a[0], buffer, none, 1.0)
    bgmv_expand(buffer, b[0], y, none, True)
    torch.testing.assert_close(y, x @ a[0][-1, 0].t() @ b[0][-1, 0].t(), rtol=1e-4, atol=1e-4)
