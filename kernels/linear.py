"""``dX = dY W`` of a frozen linear layer, by the fastest GEMM of the processor."""

import functools
from pathlib import Path

import torch

# Without AVX-512 MKL is as good from here on.
_FEW_ROWS = 32


def use_onednn(num_rows: int) -> bool:
    """Whether oneDNN multiplies so many float32 rows faster than torch's BLAS (MKL).

    MKL uses AVX-512 on Intel's processors only: on an AMD EPYC it reaches 137 and 185 GFLOP/s with
    64 and 512 rows where oneDNN reaches 211 and 217; on an Intel Xeon 298 and 338 against 215 and
    297, since it packs better. On an AMD EPYC without AVX-512 a decoder layer's products of 12, 32
    and 64 rows take MKL 2.6, 4.0 and 4.9 ms and oneDNN 1.7, 3.0 and 5.4. The processor decides and
    no trial, so that every run of a machine rounds alike.
    """
    return num_rows <= _onednn_rows()


def prefers_packed() -> bool:
    """Whether oneDNN is the faster one for any number of rows where the weight is packed for it.

    On an AMD EPYC without AVX-512 as well: a decoder layer's products of 16, 64, 128 and 512 rows
    run at 47, 81, 90 and 119 GFLOP/s, by MKL at 30, 60, 77 and 107.
    """
    return _onednn_rows() > 0


@functools.cache
def _onednn_rows() -> float:
    """Up to how many rows oneDNN is the faster one."""
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        intel = False
    capability = torch.backends.cpu.get_cpu_capability()
    if intel or not torch.backends.mkldnn.is_available():
        return 0
    return {"AVX512": float("inf"), "AVX2": _FEW_ROWS}.get(capability, 0)


def input_gradient(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``dy @ weight``.

    Args:
        dy: ``[num_tokens, out_features]``.
        weight: ``[out_features, in_features]``, row-major: as such it is already in the order that
            the GEMM reads, and needs no packing.

    Returns:
        ``[num_tokens, in_features]`` in the same dtype.
    """
    if dy.device.type == "cpu" and dy.dtype == torch.float32 and use_onednn(len(dy)):
        return torch.ops.mkldnn._linear_pointwise.default(dy, weight.t(), None, "none", [], "")
    return dy @ weight
