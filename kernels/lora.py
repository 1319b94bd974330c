"""The LoRA products of linear layers that read the same input, forward and backward.

Layers that share their input (q, k and v; gate and up) are one merged linear in vLLM. Their LoRA
matrices ``A`` are kept concatenated, so that ``x A^T`` and ``dA`` are one GEMM for all of them.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_long, c_void_p
from dataclasses import dataclass

import torch

from flexllm_vllm.kernels import native


class _Target(ctypes.Structure):
    """``LoraTarget`` of ``cpu/lora.cpp``."""

    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("b_row", c_long),
        ("start", c_long),
        ("end", c_long),
        ("grad_a", c_void_p),
        ("grad_b", c_void_p),
    )


class NativeLora:
    """The matrices of the targets within one merged linear, as the CPU kernels read them.

    It is made once and holds wherever the matrices are not reallocated.

    Args:
        a: for each target ``[r, in_features]``.
        b: for each target ``[out_features, r]``; its rows may be apart.
        columns: for each target its ``(start, end)`` in the merged output.
        grads: float32 accumulators like ``a`` and like ``b``.
    """

    def __init__(
        self,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        columns: Sequence[tuple[int, int]],
        grads: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None,
    ) -> None:
        grad_a, grad_b = grads or ((), ())
        matrices = (*a, *b, *grad_a, *grad_b)
        self._matrices = matrices  # they live as long as their addresses are known here
        self.is_usable = (
            native.library() is not None
            and all(
                m.dtype == torch.float32 and m.device.type == "cpu" and m.stride(1) == 1
                for m in matrices
            )
            and all(m.is_contiguous() for m in (*a, *grad_a, *grad_b))
        )
        self.r, self.in_features = a[0].shape
        # Of each row of the products of rank size: the kernels read and write whole vectors.
        self.shrunk_width = len(b) * -(-self.r // native.lanes()) * native.lanes()
        self._targets = (_Target * len(b))()
        for i, (start, end) in enumerate(columns if self.is_usable else ()):
            target = self._targets[i]
            target.a, target.b, target.b_row = a[i].data_ptr(), b[i].data_ptr(), b[i].stride(0)
            target.start, target.end = start, end
            if grads is not None:
                target.grad_a, target.grad_b = grad_a[i].data_ptr(), grad_b[i].data_ptr()

    def add(
        self, y: torch.Tensor, x: torch.Tensor, scaling: float, rows: slice | None = None
    ) -> bool:
        """As :func:`lora_add`; False where the kernels cannot."""
        # 120 times in a forward, and of few rows: each microsecond here counts.
        if not self.is_usable or x.dtype is not torch.float32 or y.dtype is not torch.float32:
            return False
        (y_row, y_column), (x_row, x_column) = y.stride(), x.stride()
        if y_column != 1 or x_column != 1:
            return False
        first, last = (0, len(x)) if rows is None else (rows.start, rows.stop)
        native.function("lora_add")(
            0, y.data_ptr() + 4 * first * y_row, y_row, x.data_ptr() + 4 * first * x_row, x_row,
            last - first, self.in_features, self._targets, len(self._targets), self.r, scaling,
        )  # fmt: skip
        return True

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor | None,
        dx: torch.Tensor | None,
        g: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor | None:
        """As :func:`lora_backward`, ``g`` ``[num_tokens, shrunk_width]``; None where the kernels
        cannot."""
        if not self._can(*(t for t in (dy, x, dx) if t is not None)):
            return None
        has_g = g is not None
        if g is None:
            g = dy.new_empty(len(dy), self.shrunk_width)
        if not native.call(
            "lora_backward", dy, dy.stride(0), x, 0 if x is None else x.stride(0), dx,
            0 if dx is None else dx.stride(0), g, has_g, len(dy), self.in_features, self._targets,
            len(self._targets), self.r, scaling,
        ):  # fmt: skip
            return None
        return g

    def _can(self, *rows: torch.Tensor) -> bool:
        return self.is_usable and all(
            t.dtype == torch.float32 and t.stride(-1) == 1 and t.dim() == 2 for t in rows
        )


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

    def native(self, grad: "LoraGroup | None" = None) -> NativeLora:
        """For the CPU kernels, with the accumulators where there are any."""
        keeper = self if grad is None else grad
        kept: tuple[LoraGroup, NativeLora] | None = keeper.__dict__.get("_native")
        if kept is None or kept[0] is not self:
            r = self.r
            a = [self.a[i * r : (i + 1) * r] for i in range(len(self.b))]
            grads = None
            if grad is not None:
                grads = ([grad.a[i * r : (i + 1) * r] for i in range(len(self.b))], grad.b)
            kept = (self, NativeLora(a, self.b, self.columns, grads))
            keeper.__dict__["_native"] = kept
        return kept[1]

    def first_columns(self, width: int) -> "LoraGroup":
        """The part that computes columns ``[0, width)`` of the merged output."""
        columns = tuple((start, min(end, width)) for start, end in self.columns if start < width)
        if columns == self.columns:
            return self
        pairs = zip(self.b, columns, strict=False)
        b = tuple(matrix[: end - start] for matrix, (start, end) in pairs)
        return LoraGroup(self.a[: len(b) * self.r], b, columns, self.scaling)


def lora_add(
    y: torch.Tensor, x: torch.Tensor, group: LoraGroup, rows: slice | None = None
) -> torch.Tensor:
    """Adds ``scaling * x A^T B^T`` to the merged output ``y``, in place.

    Args:
        y: ``[num_tokens, out_features]``, the merged output, or the first columns of it that the
            group covers.
        x: ``[num_tokens, in_features]``.
        group: matrices in float32 or the dtype of ``x``.
        rows: of ``y`` and ``x``, start and stop given; None for all.

    Returns:
        ``y``.
    """
    if not group.columns or group.native().add(y, x, group.scaling, rows):
        return y
    if rows is not None:
        lora_add(y[rows], x[rows], group)
        return y
    r = group.r
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
        g: what an earlier call returned; computed if not given.

    Returns:
        ``g``, ``[num_tokens, num_targets * r]``, each target's columns padded in the CPU kernels.
    """
    found = group.native(grad).backward(dy, x, dx, g, group.scaling)
    if found is not None:
        return found
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
