"""The LoRA products of linear layers that read the same input, forward and backward.

Layers that share their input (q, k and v; gate and up) are one merged linear in vLLM. Their LoRA
matrices ``A`` are kept concatenated, so that ``x A^T`` and ``dA`` are one GEMM for all of them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraGroup:
    """LoRA matrices of the targets within one merged linear.

    Attributes:
        a: ``[num_targets * r, in_features]``.
        b: for each target ``[out_features, r]``.
        columns: for each target its ``(start, end)`` in the merged output, in order.
        scaling: factor of ``B A``.
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    columns: tuple[tuple[int, int], ...]
    scaling: float

    @property
    def r(self) -> int:
        return self.b[0].shape[1] if self.b else 0

    def first_columns(self, width: int) -> "LoraGroup":
        """The part that computes columns ``[0, width)`` of the merged output."""
        columns = tuple((start, min(end, width)) for start, end in self.columns if start < width)
        if columns == self.columns:
            return self
        pairs = zip(self.b, columns, strict=False)
        b = tuple(matrix[: end - start] for matrix, (start, end) in pairs)
        return LoraGroup(self.a[: len(b) * self.r], b, columns, self.scaling)


def lora_add(y: torch.Tensor, x: torch.Tensor, group: LoraGroup) -> torch.Tensor:
    """Adds ``scaling * x A^T B^T`` to the merged output ``y``, in place.

    Args:
        y: ``[num_tokens, out_features]``, the merged output, or the first columns of it that the
            group covers.
        x: ``[num_tokens, in_features]``.
        group: matrices in float32 or the dtype of ``x``.

    Returns:
        ``y``.
    """
    r = group.r
    if not group.columns:
        return y
    u = x @ group.a.to(x.dtype).t()
    for i, (start, end) in enumerate(group.columns):
        b = group.b[i].to(x.dtype)
        y[:, start:end].addmm_(u[:, i * r : (i + 1) * r], b.t(), alpha=group.scaling)
    return y


def lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    group: LoraGroup,
    grad: LoraGroup | None,
    dx: torch.Tensor | None,
    g: torch.Tensor | None = None,
) -> torch.Tensor:
    """Accumulates ``dA``, ``dB`` and adds the adapter's share to ``dx``.

    With ``u = x A^T`` and ``g_i = scaling * dy_i B_i``: ``dB_i += scaling * dy_i^T u_i``,
    ``dA += g^T x``, ``dx += g A``. Where ``dx`` is needed before ``x`` is known, it is called
    twice: without ``x`` and ``grad``, then with them and the ``g`` that the first call returned.

    Args:
        dy: ``[num_tokens, out_features]``, gradient of the merged output.
        x: ``[num_tokens, in_features]``, input of the linear.
        group: the matrices.
        grad: float32 accumulators shaped like ``group``, updated in place.
        dx: ``[num_tokens, in_features]``, updated in place; None where nobody needs it.
        g: ``[num_tokens, num_targets * r]``, computed if not given.

    Returns:
        ``g``.
    """
    r = group.r
    a = group.a.to(dy.dtype)
    if g is None:
        g = dy.new_empty(dy.shape[0], len(group.b) * r)
        for i, (b, (start, end)) in enumerate(zip(group.b, group.columns, strict=True)):
            torch.mm(dy[:, start:end], b.to(dy.dtype), out=g[:, i * r : (i + 1) * r])
        g *= group.scaling
    if x is not None and grad is not None:
        u = x @ a.t()
        for i, (start, end) in enumerate(group.columns):
            u_i = u[:, i * r : (i + 1) * r]
            grad.b[i].add_((u_i.t() @ dy[:, start:end]).t(), alpha=group.scaling)
        grad.a.add_(g.t() @ x)
    if dx is not None:
        dx.addmm_(g, a)
    return g
