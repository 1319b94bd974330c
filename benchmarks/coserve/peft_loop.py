"""The peer: a PEFT training process that never ends.

``python -m benchmarks.coserve.peft_loop MODEL ADAPTER DATA MARKS`` appends a line to MARKS for each
example trained: its own processor time in seconds, and the example's tokens. Processor time,
because the process is stopped at times, and only its own work counts.
"""

import itertools
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.coserve.data import BATCH
from benchmarks.coserve.processes import group_cpu_seconds
from benchmarks.train.peft_process import Peft


def main() -> None:
    """Gradients of :data:`BATCH` examples are accumulated one by one: the same step as a batch of
    as many, without its padding and at a quarter of its memory, which is faster on a CPU."""
    model, adapter, data, marks = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peft = Peft(model, adapter, "float32", checkpointing=False)
    examples = json.loads(Path(data).read_text())
    with Path(marks).open("a", buffering=1) as stream:
        for number, batch in enumerate(itertools.cycle(examples), start=1):
            peft.accumulate(batch, share=1 / BATCH)
            if number % BATCH == 0:
                peft.update()
            tokens = sum(len(ids) for ids, _ in batch)
            print(group_cpu_seconds(os.getpgrp()), tokens, file=stream)


if __name__ == "__main__":
    main()
