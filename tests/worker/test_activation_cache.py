"""The activation cache: what is written comes back, whatever the pages and windows."""

import random

import pytest
import torch

from flexllm_vllm.worker.activation_cache import ActivationCache
from flexllm_vllm.worker.activation_codec import ActivationDtype, build_codec

WIDTHS = {(0, "hidden"): 24, (0, "gate_up"): 70, (1, "hidden"): 24}


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize("stored", ["auto", "int8"])
@pytest.mark.parametrize("seed", range(20))
def test_rows_come_back_whatever_the_pages_and_windows(
    seed: int, stored: ActivationDtype, is_indexed: bool
) -> None:
    rng = random.Random(seed)
    codec = build_codec(torch.float32, stored)
    cache = ActivationCache(40, 4000 - seed % 3, codec, torch.device("cpu"), is_indexed)
    layout = cache.layout(WIDTHS)
    if stored == "auto":
        assert layout.tokens_per_page == (4000 - seed % 3) // (4 * (24 + 70 + 24))
    free = list(range(40))
    if seed % 2:
        rng.shuffle(free)
    packs = []
    for _ in range(3):
        rows = rng.randint(1, 100)
        kept = cache.rows(layout, [free.pop(0) for _ in range(layout.num_pages(rows))])
        packs.append((kept, {key: torch.randn(rows, width) for key, width in WIDTHS.items()}))
    for kept, values in packs:
        for key, value in values.items():
            start = 0
            while start < len(value):
                end = min(len(value), start + rng.randint(1, 40))
                rows = value[start:end]
                if rng.random() < 0.5:
                    cache.write(kept, key, start, rows)
                else:  # a part of a wider tensor, and what is to be added to it
                    wide = torch.randn(len(rows), rows.shape[1] + 3)
                    x = wide[:, : rows.shape[1]]
                    more = rows - x
                    value[start:end] = x + more
                    cache.write(kept, key, start, x, more)
                start = end
    for kept, values in packs:
        for key, value in values.items():
            start = rng.randrange(len(value))
            end = rng.randint(start + 1, len(value))
            found = cache.read(kept, key, start, end)
            exact = value[start:end]
            if stored == "int8":
                exact = codec.decode(codec.encode(exact), exact.shape[1])
            assert torch.equal(found, exact)


def test_an_adapter_that_keeps_less_gets_more_tokens_into_a_page() -> None:
    cache = ActivationCache(2, 4000, build_codec(torch.float32, "auto"), torch.device("cpu"))
    assert cache.layout({(0, "hidden"): 24}).tokens_per_page == 41
    with pytest.raises(ValueError, match="a token keeps 8000 bytes"):
        cache.layout({(0, "hidden"): 2000})


@pytest.mark.parametrize(
    ("stored", "bytes_of_100", "error"),
    [("auto", 400, 0), ("bfloat16", 200, 4e-3), ("int8", 108, 8e-3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codecs(
    stored: ActivationDtype, bytes_of_100: int, error: float, dtype: torch.dtype
) -> None:
    codec = build_codec(dtype, stored)
    if stored != "auto":
        assert codec.row_bytes(100) == bytes_of_100
    x = torch.randn(50, 100).to(dtype)
    x[3] = 0
    x[4, 7] = 1e4  # an outlier spoils its own group only
    y = codec.decode(codec.encode(x), 100)
    assert y.dtype == dtype
    assert torch.equal(y[3], x[3])
    others = torch.ones(50, 100, dtype=torch.bool)
    others[4, :64] = False
    assert (y - x)[others].norm() <= max(error, 4e-3 if dtype is torch.bfloat16 else 0) * 3 * x[
        others
    ].norm()
