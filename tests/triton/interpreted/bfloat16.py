"""bfloat16 in Triton's interpreter as it is on a GPU.

The interpreter (Triton 3.9) holds bfloat16 as ``uint16``. It multiplies matrices of them as
integers, and rounds towards zero where a GPU rounds to the nearest.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _to_float32(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _cast_rounded(self, source, target):
    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return _cast(self, source, target)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)


def _dot_of_values(self, a, b, *rest):
    # A product of two bfloat16 is exact in float32, in which tensor cores add them up.
    return _dot(self, _to_float32(a), _to_float32(b), *rest)


def install() -> None:
    InterpreterBuilder.cast_impl = _cast_rounded
    InterpreterBuilder.create_dot = _dot_of_values
