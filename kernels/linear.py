"""``dX = dY W`` of a frozen linear layer, by the fastest GEMM of the processor."""

import functools

import torch


@functools.cache
def _use_onednn() -> bool:
    """oneDNN uses AVX-512 on every processor that has it, torch's BLAS (MKL) on Intel's only: on an
    AMD EPYC 137 and 185 GFLOP/s against 211 and 217, with 64 and 512 rows."""
    return torch.backends.mkldnn.is_available() and (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
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
    if dy.device.type == "cpu" and dy.dtype == torch.float32 and _use_onednn():
        return torch.ops.mkldnn._linear_pointwise.default(dy, weight.t(), None, "none", [], "")
    return dy @ weight
