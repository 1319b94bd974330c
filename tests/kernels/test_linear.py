import pytest
import torch

from flexllm_vllm.kernels import linear


@pytest.mark.parametrize("most", [0, 4, float("inf")])
@pytest.mark.parametrize("num_rows", [1, 4, 5, 70])
def test_the_input_gradient_whatever_multiplies(
    num_rows: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_onednn_rows", lambda: most)
    assert linear.use_onednn(num_rows) is (num_rows <= most)
    generator = torch.Generator().manual_seed(num_rows)
    dy = torch.randn(num_rows, 48, generator=generator)
    weight = torch.randn(48, 33, generator=generator)
    expected = dy.double() @ weight.double()
    torch.testing.assert_close(linear.input_gradient(dy, weight).double(), expected, rtol=1e-5,
                               atol=1e-5)  # fmt: skip
