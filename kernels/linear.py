"""``dX = dY W`` of a frozen linear layer, by the fastest GEMM of the processor."""

import functools
from pathlib import Path

import torch


@functools.cache
def use_onednn() -> bool:
    """Whether oneDNN multiplies plain float32 matrices faster than torch's BLAS (MKL).

    MKL uses AVX-512 on Intel's processors only: on an AMD EPYC it reaches 137 and 185 GFLOP/s with
    64 and 512 rows where oneDNN reaches 211 and 217; on an Intel Xeon 298 and 338 against 215 and
    297, since it packs better. The processor decides and no trial, so that every run of a machine
    rounds alike.
    """
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        intel = False
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not intel
    )


def input_gradient(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``dy @ weight``.

    Args:
        dy: ``[num_tokens, out_features]``.
        weight: ``[out_features, in_features]``, row-major: as such it is already in the order that
            the GEMM reads, and needs no packing.

    Returns:
        ``[num_tokens, in_features]`` in the same dtype.
    """
    if dy.device.type == "cpu" and dy.dtype == torch.float32 and use_onednn():
        return torch.ops.mkldnn._linear_pointwise.default(dy, weight.t(), None, "none", [], "")
    return dy @ weight
