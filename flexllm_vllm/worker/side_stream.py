"""A stream of its own for the backward, beside the forward of inference.

What is given to one stream is executed in order, what is given to two side by side, but for what
one waits for of the other. Here, in each iteration with finetuning work:

- the forward waits for the work of the iteration *before*, whose pages and KV blocks may be given
  anew by now;
- the work waits for all forwards before: their K and V, and what they captured, are what it reads;
- the forward waits for the work of *this* iteration too where it holds finetuning rows: they need
  the weights of an optimizer step, and pages that the work has just given back.

So the forward of an iteration with backward windows alone, which is inference's, goes beside them.
What the work allocates belongs to this stream's part of the allocator, and nothing that the work
reads is allocated elsewhere but for what lives as long as the worker; hence :meth:`allocating`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """The stream of the finetuning work.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None

    @contextmanager
    def work(self, before_forward: bool) -> Iterator[None]:
        """What is done within is the finetuning work of an iteration.

        Args:
            before_forward: whether this iteration's forward needs it.
        """
        main = torch.cuda.current_stream(self._device)
        self.wait_for_last()
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._done = torch.cuda.Event()
            self._done.record(self._stream)
            if before_forward:
                self.wait_for_last()

    def wait_for_last(self) -> None:
        """The forward that comes waits for the last iteration with work, if it has not yet."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._done = None

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """What is allocated within is read by the work alone."""
        with torch.cuda.stream(self._stream):
            yield
