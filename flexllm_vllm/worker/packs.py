"""Finetuning sequences between their forward and the end of their backward."""

import bisect
from dataclasses import dataclass, field

import torch

from flexllm_vllm.models.base import ModelBackward, RowSegment
from flexllm_vllm.plan import OpenPack
from flexllm_vllm.worker.activation_cache import KeptRows
from flexllm_vllm.worker.transfer import to_device


@dataclass
class PackState:
    """A pack in the worker.

    Attributes:
        spec: as the scheduler opened it.
        rotary: cosines and sines at the rows' positions (``ModelBackward.rotary_table``).
        targets: ``[num_rows]`` int64, -1 where a row carries no loss.
        bearing: positions of the rows that carry loss, in order, on the host.
        bearing_rows: the same on the device.
        reference: ``[num_sequences]`` float64, with a preference loss: its reference.
        d_hidden: ``[num_rows, hidden_size]`` float32, gradient of the residual stream at the
            layer that the backward has reached.
        block_ids: block table of each sequence, by row id, known from its first window on.
        kept: where its rows lie in the activation cache.
        sequence_of: ``[num_rows]`` int64, the sequence that a row belongs to.
        loss, num_correct: ``[1]`` float64, sums over the loss-bearing tokens so far.
        logps: ``[num_sequences]`` float64, log-probabilities of the targets so far.
    """

    spec: OpenPack
    kept: KeptRows
    rotary: torch.Tensor
    targets: torch.Tensor
    starts: list[int]
    sequence_of: torch.Tensor
    logps: torch.Tensor
    loss: torch.Tensor
    num_correct: torch.Tensor
    bearing: list[int]
    bearing_rows: torch.Tensor
    reference: torch.Tensor | None = None
    d_hidden: torch.Tensor | None = None
    dk: list[torch.Tensor] = field(default_factory=list)
    dv: list[torch.Tensor] = field(default_factory=list)
    block_ids: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, spec: OpenPack, model: ModelBackward, kept: KeptRows) -> "PackState":
        lengths = [len(s.targets) for s in spec.sequences]
        targets = [t for s in spec.sequences for t in s.targets]
        bearing = [row for row, target in enumerate(targets) if target >= 0]
        positions = torch.cat([torch.arange(n) for n in lengths])
        sequence_of = torch.repeat_interleave(torch.tensor(lengths), output_size=len(targets))

        def on_device(x: torch.Tensor) -> torch.Tensor:
            return to_device(x, model.device)

        def sums(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.float64, device=model.device)

        reference = None
        if spec.preference is not None:
            scores = torch.tensor(spec.preference.reference, dtype=torch.float64)
            reference = on_device(scores)
        return cls(
            spec=spec,
            kept=kept,
            sequence_of=on_device(sequence_of),
            logps=sums(len(lengths)),
            loss=sums(1),
            num_correct=sums(1),
            rotary=model.rotary_table(on_device(positions)),
            targets=on_device(torch.tensor(targets)),
            bearing=bearing,
            bearing_rows=on_device(torch.tensor(bearing, dtype=torch.int64)),
            starts=[sum(lengths[:i]) for i in range(len(lengths))],
            reference=reference,
        )

    def bearing_in(self, rows: slice) -> torch.Tensor:
        """``[n]`` int64: of a window's rows those that carry loss, counted from its first."""
        first, end = (bisect.bisect_left(self.bearing, edge) for edge in (rows.start, rows.stop))
        return self.bearing_rows[first:end] - rows.start

    def begin_backward(self, model: ModelBackward) -> None:
        """Allocates what the backward carries from window to window."""
        device = model.device
        self.d_hidden = torch.zeros(self.spec.num_rows, model.hidden_size, device=device)
        shapes = [
            (model.num_kv_heads, len(s.targets), model.head_size) for s in self.spec.sequences
        ]
        self.dk = [torch.zeros(shape, device=device) for shape in shapes]
        self.dv = [torch.zeros(shape, device=device) for shape in shapes]

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
