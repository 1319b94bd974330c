"""Waiting for a change of the store, without blocking the event loop."""

import asyncio

from flexllm_vllm.jobs.store import JobStore

POLL_S = 0.2


class StoreWatch:
    """Wakes coroutines when a process has changed the store. One look each ``POLL_S`` seconds
    serves all that wait; there is none while nobody waits."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._polling: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many coroutines wait."""
        return len(self._waiting)

    async def changed(self, version: int, timeout_s: float) -> bool:
        """Waits until ``JobStore.data_version`` is another one; False: not within the time."""
        woken = asyncio.get_running_loop().create_future()
        self._waiting[woken] = version
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(timeout_s):
                await woken
        except TimeoutError:
            return False
        finally:
            del self._waiting[woken]
        return True

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if not self._waiting:
                return
            now = await asyncio.to_thread(self._store.data_version)
            for woken, version in self._waiting.items():
                if version != now and not woken.done():
                    woken.set_result(None)
