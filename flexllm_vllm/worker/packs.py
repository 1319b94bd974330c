"""Finetuning sequences between their forward and the end of their backward."""

from dataclasses import dataclass, field

import torch

from flexllm_vllm.models.base import ModelBackward, RowSegment
from flexllm_vllm.plan import OpenPack
from flexllm_vllm.worker.activation_cache import TokenLayout


@dataclass
class PackState:
    """A pack in the worker.

    Attributes:
        spec: as the scheduler opened it.
        pages: of the activation cache.
        rotary: ``[num_rows, rotary_dim]``, cosines and sines at the rows' positions.
        targets: ``[num_rows]`` int64, -1 where a row carries no loss.
        d_hidden: ``[num_rows, hidden_size]`` float32, gradient of the residual stream at the
            layer that the backward has reached.
        block_ids: block table of each sequence, by row id, known from its first window on.
        layout: of its rows in the activation cache.
        sequence_of: ``[num_rows]`` int64, the sequence that a row belongs to.
        loss, num_correct: sums over the loss-bearing tokens so far.
        logps: ``[num_sequences]`` float64, log-probabilities of the targets so far.
    """

    spec: OpenPack
    layout: TokenLayout
    pages: list[int]
    rotary: torch.Tensor
    targets: torch.Tensor
    starts: list[int]
    sequence_of: torch.Tensor
    logps: torch.Tensor
    d_hidden: torch.Tensor | None = None
    dk: list[torch.Tensor] = field(default_factory=list)
    dv: list[torch.Tensor] = field(default_factory=list)
    block_ids: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: float = 0.0
    num_correct: int = 0

    @classmethod
    def open(cls, spec: OpenPack, model: ModelBackward, layout: TokenLayout) -> "PackState":
        lengths = [len(s.targets) for s in spec.sequences]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return cls(
            spec=spec,
            layout=layout,
            sequence_of=torch.repeat_interleave(torch.tensor(lengths)),
            logps=torch.zeros(len(lengths), dtype=torch.float64),
            pages=list(spec.pages),
            rotary=model.rotary_table(torch.cat([torch.arange(n) for n in lengths])),
            targets=torch.tensor([t for s in spec.sequences for t in s.targets]),
            starts=starts,
        )

    def begin_backward(self, model: ModelBackward) -> None:
        """Allocates what the backward carries from window to window."""
        self.d_hidden = torch.zeros(self.spec.num_rows, model.hidden_size)
        shapes = [
            (model.num_kv_heads, len(s.targets), model.head_size) for s in self.spec.sequences
        ]
        self.dk = [torch.zeros(shape) for shape in shapes]
        self.dv = [torch.zeros(shape) for shape in shapes]

    def begin_layer(self) -> None:
        """Clears the KV-gradient accumulators; they live for one layer."""
        for accumulator in (*self.dk, *self.dv):
            accumulator.zero_()

    def offset(self, row_id: str) -> int:
        """Where a sequence begins in the concatenation."""
        index = next(i for i, s in enumerate(self.spec.sequences) if s.row_id == row_id)
        return self.starts[index]

    def segments(self, start: int, end: int) -> list[RowSegment]:
        """The sequences that rows ``[start, end)`` of the concatenation belong to."""
        found = []
        for i, sequence in enumerate(self.spec.sequences):
            first, last = self.starts[i], self.starts[i] + len(sequence.targets)
            lo, hi = max(start, first), min(end, last)
            if lo < hi:
                found.append(
                    RowSegment(
                        rows=slice(lo - start, hi - start),
                        start=lo - first,
                        block_ids=self.block_ids[sequence.row_id],
                        dk=self.dk[i],
                        dv=self.dv[i],
                    )
                )
        return found
