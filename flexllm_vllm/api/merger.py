"""Does the merges that the store has: a task in each API process, of which one at a time works.

PEFT runs in a process of its own with the lowest priority (``adapter_files/merging.py``), so that
requests hardly notice. A merge whose process or server dies is begun anew.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from flexllm_vllm.adapter_files.base_linears import BaseLinears
from flexllm_vllm.adapter_files.check import check_adapter
from flexllm_vllm.adapter_files.durable import publish
from flexllm_vllm.adapter_files.errors import AdapterFileError
from flexllm_vllm.adapter_files.merge_job import MergeJob
from flexllm_vllm.api.background import in_background
from flexllm_vllm.api.child_process import child_environment
from flexllm_vllm.jobs.adapter_types import AdapterMerge
from flexllm_vllm.jobs.merges import LEASE_S
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

POLL_S = 1.0
TIMEOUT_S = 3600.0
_CHILD_POLL_S = 0.1
_PROGRAM = "flexllm_vllm.adapter_files.merging"
# Of what the program writes to standard error, the end; the reason is its last line.
_MAX_ERROR_BYTES = 64 * 1024


class MergeError(Exception):
    """A merge that cannot be done, and why."""


class Merger:
    """Merges as one API process does them.

    Args:
        base_models: served names of the base model; merges for others are left to other servers.
        base: its linears.
        max_lora_rank: of what can be served.
        poll_s: seconds between looks for changes of the store.
        lease_s: seconds that a merge stays ours without a sign of life.
    """

    def __init__(
        self,
        store: JobStore,
        base_models: tuple[str, ...],
        base: BaseLinears,
        max_lora_rank: int,
        poll_s: float = POLL_S,
        lease_s: int = LEASE_S,
    ) -> None:
        self._store = store
        self._base_models = base_models
        self._base = base
        self._max_lora_rank = max_lora_rank
        self._poll_s = poll_s
        self._lease_s = lease_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Merge as long as the context lasts."""
        async with in_background(self._watch()):
            yield

    async def _watch(self) -> None:
        while True:
            try:
                merge = await asyncio.to_thread(self._claim)
                if merge is not None:
                    await self._do(merge)
                    continue
            except Exception:
                logger.exception("merges: the store cannot be used; trying again")
                await asyncio.sleep(10 * self._poll_s)
            await asyncio.sleep(self._poll_s)

    def _claim(self) -> AdapterMerge | None:
        # A look without the store's write lock first: mostly there is nothing to do.
        if not self._store.merges.any_unfinished(self._base_models):
            return None
        return self._store.merges.claim(self._lease_s, self._base_models)

    async def _do(self, merge: AdapterMerge) -> None:
        logger.info("merge %s begins: %s", merge.id, merge.name)
        partial = self._store.adapters_folder / f".{merge.id}.{merge.claim}"
        try:
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
            await self._merge(merge, partial)
            await asyncio.to_thread(self._publish, merge, partial)
        except asyncio.CancelledError:
            self._store.merges.release(merge)  # without an await, which could be cancelled
            raise
        except (MergeError, AdapterFileError) as error:
            logger.warning("merge %s failed: %s", merge.id, error)
            await asyncio.to_thread(self._store.merges.fail, merge, "merge_failed", str(error))
        except Exception:
            logger.exception("merge %s failed", merge.id)
            reason = "The server had an error while merging"
            await asyncio.to_thread(self._store.merges.fail, merge, "server_error", reason)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    async def _merge(self, merge: AdapterMerge, partial: Path) -> None:
        spec = merge.spec
        result = partial / "adapter"
        result.mkdir()
        job = MergeJob(
            paths=await asyncio.to_thread(self._paths, merge),
            weights=[adapter.weight for adapter in spec.adapters],
            method=spec.method,
            density=spec.density,
            svd_rank=spec.svd_rank,
            majority_sign_method=spec.majority_sign_method,
            seed=spec.seed,
            modules=self._base.paths(),
            num_layers=self._base.num_layers,
            result=str(result),
        )
        job.write(partial / "merge.json")
        with (partial / "stderr").open("w+b") as errors:
            # Without an await: one that is cancelled would leave a process that nobody ends.
            process = _start(partial / "merge.json", errors)
            try:
                await self._wait(merge, process)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
            if process.returncode:
                raise MergeError(_reason(errors.fileno(), process.returncode))

    async def _wait(self, merge: AdapterMerge, process: subprocess.Popen[bytes]) -> None:
        """For the end of the process, while it is said that we live."""
        began = renewed = time.monotonic()
        while process.poll() is None:
            await asyncio.sleep(_CHILD_POLL_S)
            now = time.monotonic()
            if now - began > TIMEOUT_S:
                raise MergeError(f"it was not done after {TIMEOUT_S:.0f} s")
            if now - renewed > self._lease_s / 4:
                renewed = now
                if not await asyncio.to_thread(self._store.merges.renew, merge, self._lease_s):
                    raise MergeError("another process has taken it over")

    def _paths(self, merge: AdapterMerge) -> list[str]:
        paths = []
        for wanted in merge.spec.adapters:
            adapter = self._store.adapters.get(wanted.name, merge.organization_id)
            if adapter is None:
                raise MergeError(f"The adapter '{wanted.name}' does not exist any more")
            paths.append(adapter.path)
        return paths

    def _publish(self, merge: AdapterMerge, partial: Path) -> None:
        check_adapter(partial / "adapter", self._base, self._max_lora_rank)
        folder = self._store.adapters_folder / f"{merge.id}.{merge.claim}"
        publish(partial / "adapter", folder)
        if self._store.merges.succeed(merge, folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            logger.info("merge %s succeeded: %s", merge.id, merge.name)


def _start(job: Path, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _PROGRAM, str(job)],
        env=child_environment(),
        stdin=subprocess.PIPE,  # the program ends with it, and so with this process
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )


def _reason(stderr: int, returncode: int) -> str:
    """Why the program has failed, in its own words if it has any."""
    size = os.fstat(stderr).st_size
    text = os.pread(stderr, _MAX_ERROR_BYTES, max(0, size - _MAX_ERROR_BYTES))
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    if returncode < 0:
        return f"the process that merged was ended by signal {-returncode}"
    return lines[-1][:1000] if lines else f"the process that merged ended with {returncode}"
