"""Adapters are written to disk by a thread, so that no request waits for a disk."""

import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexllm_vllm.plan import SaveAdapter
from flexllm_vllm.worker.adapter import AdapterSnapshot, TrainableAdapter
from flexllm_vllm.worker.adapter_files import save_adapter

LEAST_PRIORITY = 19


@dataclass
class _Save:
    """One order. ``copied`` is set when the adapter may change again; ``snapshot`` is what is to be
    written, where it was taken already."""

    order: SaveAdapter
    adapter: TrainableAdapter
    snapshot: AdapterSnapshot | None
    copied: threading.Event


@dataclass(frozen=True)
class SaveResult:
    """What became of an order; ``error`` is None where the folder is complete."""

    order: SaveAdapter
    error: Exception | None


def _give_way() -> None:
    """Leaves the processor to iterations: this thread runs where they do not.

    A checkpoint takes it for half a second, and on a CPU whose cores are all the worker's every
    iteration waits for its slowest core.
    """
    if hasattr(os, "setpriority") and sys.platform == "linux":  # of a thread, not of the process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)


class AdapterSaver:
    """Writes adapters one after the other.

    Args:
        write: what writes a snapshot; :func:`save_adapter`.
    """

    def __init__(self, write: Callable[..., None] = save_adapter) -> None:
        self._write = write
        self._orders: queue.SimpleQueue[_Save] = queue.SimpleQueue()
        self._results: list[SaveResult] = []
        self._open: list[_Save] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an order was not answered yet."""
        return bool(self._open or self._results)

    def save(
        self, order: SaveAdapter, adapter: TrainableAdapter, snapshot: AdapterSnapshot | None = None
    ) -> None:
        """Takes an order. The adapter must not change before :meth:`wait_until_copied`, which does
        not wait where the snapshot is there.

        Args:
            order: what is to be written, and where.
            adapter: its owner.
            snapshot: of the adapter, if it was taken already; else the thread takes it.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="adapter-saver", daemon=True)
            self._thread.start()
        save = _Save(order, adapter, snapshot, threading.Event())
        if snapshot is not None:
            save.copied.set()
        self._open.append(save)
        self._orders.put(save)

    def wait_until_copied(self, adapter: TrainableAdapter) -> None:
        """Blocks until this adapter may change."""
        for save in list(self._open):
            if save.adapter is adapter:
                save.copied.wait()

    def take_results(self) -> list[SaveResult]:
        """What was finished since the last call."""
        with self._changed:
            results, self._results = self._results, []
            return results

    def wait(self, seconds: float) -> None:
        """Blocks until something is finished, or for so long."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._results) or not self._open, seconds)

    def wait_for_all(self, seconds: float) -> bool:
        """Blocks until every order is finished; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, seconds)

    def _run(self) -> None:
        _give_way()
        while True:
            save = self._orders.get()
            error: Exception | None = None
            try:
                try:
                    snapshot = save.snapshot or save.adapter.snapshot()
                finally:
                    save.copied.set()
                order = save.order
                self._write(snapshot, Path(order.path), order.base_model, order.state)
            except Exception as raised:
                error = raised
            with self._changed:
                self._open.remove(save)
                self._results.append(SaveResult(save.order, error))
                self._changed.notify_all()
