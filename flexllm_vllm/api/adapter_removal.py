"""The folder of a deleted adapter: when it goes, and that the engine lets go of the weights.

A worker loads an adapter when a batch first holds a request for it, and again after it was pushed
out by others; an adapter that cannot be loaded then ends the engine. So a folder goes only when

- the adapter was deleted :data:`GRACE_S` ago: requests that had found its name before are served;
- no job that has not finished continues from it; nor has one written it, unless it has let go of it
  and will not go on with its training from there;
- no other engine works on the same store: what it runs is not known here;
- the engine has no request for it, waiting or running, asked again after the folder was closed
  (``jobs/adapter_folder.py``): a late request gets an error.

What is to be removed stands in the store, so that a later server goes on with it.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from flexllm_vllm.api.background import in_background
from flexllm_vllm.checkpoints import STATE_FILE
from flexllm_vllm.jobs.adapter_folder import close_folder, remove_folder
from flexllm_vllm.jobs.adapter_types import DeletedAdapter
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

# Longer than any API process takes from finding a model's name to handing the request over.
GRACE_S = 60
POLL_S = 5.0
# What lies among the adapters without a row goes after this: somebody may be writing it.
LEFTOVER_S = 24 * 3600


class AdapterRemover:
    """Removes what was deleted, a task in each API process.

    Args:
        adapters_in_use: for each engine of this server, vLLM's ids of the adapters for which it has
            requests.
        unload: makes the engine forget the weights of an id.
    """

    def __init__(
        self,
        store: JobStore,
        adapters_in_use: Callable[[], Awaitable[list[set[int]]]],
        unload: Callable[[int], Awaitable[object]],
        grace_s: float = GRACE_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._store = store
        self._adapters_in_use = adapters_in_use
        self._unload = unload
        self._grace_s = grace_s
        self._poll_s = poll_s

    async def unload(self, int_id: int) -> None:
        """Free the slot and memory of an adapter at once, if no request needs it. One that is in
        use would only be loaded again."""
        try:
            if not await self._is_in_use(int_id):
                await self._unload(int_id)
        except Exception:  # it is asked again before the folder goes
            logger.exception("the engine did not unload adapter %d", int_id)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Remove as long as the context lasts."""
        async with in_background(self._watch()):
            yield

    async def _watch(self) -> None:
        leftovers = True
        while True:
            try:
                await self._remove_due()
                if leftovers:
                    await asyncio.to_thread(self._remove_leftovers)
                    leftovers = False
            except Exception:
                logger.exception("deleted adapters could not be removed; trying again")
                await asyncio.sleep(10 * self._poll_s)
            await asyncio.sleep(self._poll_s)

    async def _remove_due(self) -> None:
        due = await asyncio.to_thread(
            self._store.adapters.removable, int(time.time() - self._grace_s)
        )
        if not due:
            return
        engines = await self._adapters_in_use()
        if await asyncio.to_thread(self._store.other_engines) > len(engines):
            return
        for adapter in due:
            await self._remove(adapter)

    async def _remove(self, adapter: DeletedAdapter) -> None:
        is_resumable = adapter.job_unfinished and (adapter.path / STATE_FILE).exists()
        if is_resumable or await self._is_in_use(adapter.int_id):
            return
        # A row says where; what lies elsewhere is not ours to remove.
        root = self._store.root
        if adapter.path != root and adapter.path.is_relative_to(root):
            await asyncio.to_thread(close_folder, adapter.path)
            if await self._is_in_use(adapter.int_id):
                return
            await self._unload(adapter.int_id)
            await asyncio.to_thread(remove_folder, adapter.path)
        await asyncio.to_thread(self._store.adapters.forget_deleted, adapter)

    async def _is_in_use(self, int_id: int) -> bool:
        return any(int_id in in_use for in_use in await self._adapters_in_use())

    def _remove_leftovers(self) -> None:
        """What imports and merges of dead processes have left."""
        known = self._store.adapters.folders()
        for path in self._store.adapters_folder.iterdir():
            with suppress(FileNotFoundError):
                if path not in known and path.stat().st_mtime < time.time() - LEFTOVER_S:
                    remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; it may be gone."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
