"""Removes what nobody needs any more while the server runs: a task in each API process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flexllm_vllm.api.background import in_background
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

# Nothing is found any more once it is over; its disk space comes back this much later.
INTERVAL_S = 600.0


class Housekeeping:
    """Sweeps the store again and again.

    Args:
        interval_s: seconds between two times.
    """

    def __init__(self, store: JobStore, interval_s: float = INTERVAL_S) -> None:
        self._store = store
        self._interval_s = interval_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sweep as long as the context lasts."""
        async with in_background(self._sweep()):
            yield

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await asyncio.to_thread(self._store.sweep)
            except Exception:
                logger.exception("what is over could not be removed; trying again")
