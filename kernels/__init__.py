"""Operations of the backward pass, one file each: the formula, its shapes, a torch implementation.

The torch implementations are the CPU path and the reference for other back-ends. They take and
return tensors, own no state, and accumulate in float32.
"""
