import pytest
import torch

from flexllm_vllm.kernels import packed_linear
from flexllm_vllm.kernels.packed_linear import PackedLinear, can_pack

SHAPES = [(64, 64), (960, 576), (576, 1536), (100, 75), (3, 5), (130, 16)]


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    bias = None if bias is None else bias.double()
    return torch.nn.functional.linear(x.double(), weight.double(), bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [*range(1, 18), 40, 95, 96, 97])
def test_any_number_of_rows(shape: tuple[int, int], num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(shape, generator=generator)
    # Rows that lie apart, as where they are a part of a wider matrix.
    x = torch.randn(num_rows, shape[1] + 3, generator=generator)[:, : shape[1]]
    linear = PackedLinear(weight)
    for bias in (None, torch.randn(shape[0], generator=generator)):
        found = linear(x, bias)
        assert found.shape == (num_rows, shape[0])
        torch.testing.assert_close(
            found.double(), expected(x, weight, bias), rtol=1e-5, atol=1e-5 * shape[1] ** 0.5
        )


def test_our_kernel_multiplies_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    if packed_linear.native.library() is None:
        pytest.skip("no C++ compiler")
    weight = torch.randn(96, 48)
    linear = PackedLinear(weight)
    by_onednn: list[int] = []
    whole = PackedLinear._by_onednn

    def count(self: PackedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        by_onednn.append(len(x))
        return whole(self, x, bias)

    monkeypatch.setattr(PackedLinear, "_by_onednn", count)
    most = linear.few_rows
    if not most and torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("oneDNN packs otherwise for this processor")
    assert most >= 16
    for num_rows in (0, 1, most, most + 1):
        assert linear(torch.randn(num_rows, 48)).shape == (num_rows, 96)
    linear(torch.randn(48, 3).t())  # elements of a row that do not adjoin
    assert by_onednn == [0, most + 1, 3]


def test_a_weight_that_is_packed_otherwise_is_left_to_onednn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_linear, "_BLOCK", 32)
    weight, x = torch.randn(96, 48), torch.randn(3, 48)
    linear = PackedLinear(weight)
    assert linear.few_rows == 0
    torch.testing.assert_close(linear(x).double(), expected(x, weight, None), rtol=1e-5, atol=1e-4)


def test_bfloat16_is_left_to_onednn() -> None:
    if not can_pack(torch.empty(4, 4).bfloat16()):
        pytest.skip("no bfloat16 in oneDNN on this processor")
    weight, x = torch.randn(96, 48).bfloat16(), torch.randn(3, 48).bfloat16()
    linear = PackedLinear(weight)
    assert linear.few_rows == 0
    torch.testing.assert_close(linear(x).double(), expected(x, weight, None), rtol=2e-2, atol=2e-1)


def test_the_weight_is_had_back() -> None:
    weight = torch.randn(100, 75)
    assert torch.equal(PackedLinear(weight).packed.to_dense(), weight)


def test_what_can_be_packed() -> None:
    assert can_pack(torch.empty(4, 4))
    assert not can_pack(torch.empty(4, 4, 4))
    assert not can_pack(torch.empty(4, 4, dtype=torch.float64))
    assert not can_pack(torch.empty(4, 4, device="meta"))
