"""Operations of the backward pass, one file each: the formula, its shapes, a torch implementation.

The torch implementations, and the C++ in ``cpu/``, are the CPU path and the reference for the
Triton kernels in ``triton/``, which tensors on a GPU are given to. Operations take and return
tensors, own no state, and accumulate in float32.
"""
