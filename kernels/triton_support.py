"""Which tensors go to the Triton kernels of ``kernels/triton``.

Triton itself is not imported here: that takes seconds, and a CPU needs none of it.
"""

import os

import torch

# Triton reads this where a kernel is defined; so do we, once. Set by the tests alone
# (``tests/triton/interpreted``): the kernels then run on the CPU, tensors of which stand for those
# of a GPU, the layout of the KV cache included.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on ``x`` is a Triton kernel's: on a GPU, or in Triton's interpreter."""
    return x.is_cuda or INTERPRETED
