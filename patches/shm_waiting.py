"""Lets engine and worker sleep while they wait for each other, on machines with few cores.

For a second after the last message vLLM's reader of the shared-memory queue spins: in the engine
process that is all of every iteration, and where the worker computes on all cores, the spinning
takes time from it. Here the reader sleeps for a hundredth of the time that it has waited so far,
which makes an iteration longer by half of that at most. (The queue's own notifications may be lost;
then it waits for seconds.)
Why a patch: the time is a constant (``SpinCondition``).
Fits vLLM 0.32 (``vllm/distributed/device_communicators/shm_broadcast.py``). Applied in the
engine and its worker when they finetune; needless once vLLM can be told not to spin.
"""

import functools
import time
from typing import Any

from flexllm_vllm.patches import require

SHARE_OF_WAIT = 0.01


def apply() -> None:
    """Wraps ``SpinCondition.wait``; once."""
    from vllm.distributed.device_communicators import shm_broadcast

    wait = require(shm_broadcast.SpinCondition, "wait")
    if getattr(wait, "_finetuning", False):
        return

    @functools.wraps(wait)
    def wait_sleeping(self: Any, *args: Any, **kwargs: Any) -> None:
        waited = time.monotonic() - self.last_read
        if waited < self.busy_loop_s:
            time.sleep(SHARE_OF_WAIT * waited)
        else:
            wait(self, *args, **kwargs)

    wait_sleeping._finetuning = True  # type: ignore[attr-defined]
    shm_broadcast.SpinCondition.wait = wait_sleeping
