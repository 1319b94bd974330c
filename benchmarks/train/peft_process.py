"""The peer: HF transformers + PEFT, eager with SDPA, in a process of its own.

Reads one JSON order a line from stdin, answers with one JSON line: see :func:`main`.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import gemm_gflops, memory_mib, reset_peak

Example = tuple[list[int], list[int]]


class Peft:
    """A model with a fresh adapter, AdamW and clipping, as ``Trainer`` sets them up."""

    def __init__(self, model: str, adapter: str, dtype: str, checkpointing: bool) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._initial = [p.detach().clone() for p in self.parameters]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the adapter as it was loaded, and a fresh optimizer."""
        for parameter, initial in zip(self.parameters, self._initial, strict=True):
            parameter.copy_(initial)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)

    def step(self, batch: list[Example]) -> float:
        """One optimizer step on a batch padded to its longest example; returns the loss."""
        loss = self.accumulate(batch)
        self.update()
        return loss

    def accumulate(self, batch: list[Example], share: float = 1.0) -> float:
        """Adds a share of the batch's gradient to what ``update`` takes; returns the loss."""
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        attention = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, (tokens, mask) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
            labels[row, : len(tokens)] = torch.where(
                torch.tensor(mask).bool(), torch.tensor(tokens), -100
            )
        loss = self.model(input_ids=ids, attention_mask=attention, labels=labels).loss
        (loss if share == 1.0 else share * loss).backward()
        return float(loss.detach())

    def update(self) -> None:
        """Clips and steps."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved_bytes(self, batch: list[Example]) -> int:
        """Bytes that autograd keeps for the backward, every storage once, weights excepted."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        ids = torch.tensor([batch[0][0]])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self.model(input_ids=ids, labels=ids).loss
        del loss
        return sum(kept.values())


def main() -> None:
    """Orders: ``load``, ``reset``, ``steps``, ``saved``, ``gemm``, ``quit``."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peft: Peft | None = None
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        kind = order.pop("order")
        answer: dict[str, Any] = {}
        if kind == "quit":
            return
        if kind == "load":
            peft = None
            reset_peak(os.getpid())
            peft = Peft(**order)
        elif kind == "reset":
            assert peft is not None
            peft.reset()
        elif kind == "gemm":
            answer = dict(gemm_gflops(getattr(torch, order["dtype"])))
        elif kind == "saved":
            assert peft is not None
            answer = {"bytes": peft.saved_bytes(json.loads(Path(order["data"]).read_text())[0])}
        elif kind == "steps":
            assert peft is not None
            batches = json.loads(Path(order["data"]).read_text())
            timed = []
            for batch in batches:
                start = time.perf_counter()
                loss = peft.step(batch)
                timed.append((time.perf_counter() - start, loss))
            answer = {"steps": timed, "peak_mib": memory_mib(os.getpid(), "VmHWM")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
