"""What the routes of adapters and merges do, without HTTP."""

import asyncio
import hashlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from flexllm_vllm.adapter_files.archive import extract_adapter, pack
from flexllm_vllm.adapter_files.base_linears import BaseLinears
from flexllm_vllm.adapter_files.check import check_adapter, name_targets
from flexllm_vllm.adapter_files.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, read_config
from flexllm_vllm.adapter_files.durable import publish
from flexllm_vllm.adapter_files.errors import AdapterFileError
from flexllm_vllm.api.adapter_objects import AdapterObject, MergeCreateRequest
from flexllm_vllm.api.adapter_removal import AdapterRemover
from flexllm_vllm.api.errors import ApiError, invalid
from flexllm_vllm.api.idempotency import create_once
from flexllm_vllm.api.limits import LimitedFile, Limits, check_size
from flexllm_vllm.api.merger import Merger
from flexllm_vllm.api.tenants import Tenant
from flexllm_vllm.jobs.adapter_types import AdapterMerge, ServedAdapter
from flexllm_vllm.jobs.content import PartialFile
from flexllm_vllm.jobs.disk import DiskSpace
from flexllm_vllm.jobs.errors import AdapterNotFoundError
from flexllm_vllm.jobs.idempotency import IdempotencyClaim
from flexllm_vllm.jobs.names import adapter_name, check_suffix, new_id
from flexllm_vllm.jobs.store import JobStore

_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# Room of an archive for what is not read in it: a README, a tokenizer, an optimizer's state.
_MARGIN_BYTES = 64 << 20
_ADAPTERS_OF_MARGIN = 4


@dataclass
class AdapterService:
    """Adapters as one API process offers them.

    Its methods block (disk) unless they are coroutines: call them from a worker thread.

    Attributes:
        base_models: served names of the base model; imports get the first.
        base: its linear layers.
        max_lora_rank: of what can be served.
        limits: how much this server takes in.
    """

    store: JobStore
    base_models: tuple[str, ...]
    base: BaseLinears
    max_lora_rank: int
    remover: AdapterRemover
    merger: Merger
    limits: Limits = field(default_factory=Limits)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Remove deleted adapters and do merges as long as the context lasts."""
        async with self.remover.running(), self.merger.running():
            yield

    @property
    def _disk(self) -> DiskSpace:
        return DiskSpace(self.store.root, self.limits.max_disk_bytes)

    @property
    def max_archive_bytes(self) -> int:
        """Limit of an archive, packed and unpacked: several of the largest adapters that this
        server can hold, and something beside them."""
        return _MARGIN_BYTES + _ADAPTERS_OF_MARGIN * self.base.adapter_bytes(self.max_lora_rank)

    def get(self, name: str, tenant: Tenant) -> ServedAdapter:
        """An adapter of the tenant.

        Raises:
            AdapterNotFoundError: no such adapter.
        """
        adapter = self.store.adapters.get(name, tenant.organization_id)
        if adapter is None:
            raise AdapterNotFoundError(name)
        return adapter

    async def delete(self, name: str, tenant: Tenant) -> None:
        """Stop serving an adapter of the tenant, in every process, and unload it.

        Raises:
            AdapterNotFoundError, AdapterInUseError: see :meth:`AdapterStore.delete`.
        """
        adapter = await asyncio.to_thread(self.store.adapters.delete, name, tenant.organization_id)
        await self.remover.unload(adapter.int_id)

    def begin_archive(
        self, announced: int, tenant: Tenant, idempotency_key: str | None = None
    ) -> LimitedFile:
        """A place for an archive of at least ``announced`` bytes, to be written and then given to
        :meth:`import_archive`.

        Raises:
            ApiError, QuotaExceededError, InsufficientStorageError: there is none.
        """
        check_size(announced, self.max_archive_bytes, "file")
        if idempotency_key is None:  # with one, the adapter may be there and counted already
            self.store.adapters.check_quotas(tenant.organization_id, tenant.quotas)
        self._disk.check(announced)
        partial = PartialFile(self.store.adapters_folder, new_id("upload"))
        return LimitedFile(partial, self.max_archive_bytes, "file", self._disk)

    def import_archive(
        self,
        archive: LimitedFile,
        suffix: str | None,
        tenant: Tenant,
        idempotency_key: str | None = None,
    ) -> ServedAdapter:
        """Check an uploaded archive and serve what is in it, once for each idempotency key.

        Raises:
            ApiError: names what is wrong with the archive, its member or tensor.
            QuotaExceededError, InsufficientStorageError: others came first.
        """
        archive.partial.sync()
        with archive.partial.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return create_once(
            self.store,
            tenant,
            "adapters",
            idempotency_key,
            lambda: json.dumps([suffix, digest]).encode(),
            lambda claim: self._import(archive.partial.path, suffix, tenant, claim),
            lambda name: self.get(name, tenant),
        )

    def _import(
        self, archive: Path, suffix: str | None, tenant: Tenant, claim: IdempotencyClaim | None
    ) -> ServedAdapter:
        if suffix:
            try:
                check_suffix(suffix)
            except ValueError as error:
                raise invalid(f"Invalid value for 'suffix': {error}", "suffix") from None
        adapter_id = new_id("adapter")
        partial = Path(tempfile.mkdtemp(prefix=".import-", dir=self.store.adapters_folder))
        folder = self.store.adapters_folder / adapter_id
        base_model = self.base_models[0]
        organization = tenant.organization_id
        name = adapter_name(base_model, organization, suffix, adapter_id)
        try:
            with archive.open("rb") as file:
                extract_adapter(file, partial, self.max_archive_bytes)
            config = check_adapter(partial, self.base, self.max_lora_rank)
            name_targets(partial, config, self.base)
            self._disk.check()
            publish(partial, folder)
            return self.store.adapters.add(
                name, folder, base_model, "import", organization, tenant.quotas, claim
            )
        except AdapterFileError as error:
            message = f"The adapter cannot be imported: {error}"
            raise invalid(message, "file", "invalid_adapter") from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def export(self, name: str, tenant: Tenant) -> Iterator[bytes]:
        """The ``tar.gz`` of an adapter, piece by piece. Its files are opened before this returns:
        it may be deleted meanwhile.

        Raises:
            AdapterNotFoundError: no such adapter.
        """
        adapter = self.get(name, tenant)
        files: list[tuple[str, BinaryIO]] = []
        try:
            for file in _FILES:
                files.append((file, (Path(adapter.path) / file).open("rb")))
        except OSError as error:
            for _, opened in files:
                opened.close()
            reason = f"The files of the adapter '{name}' cannot be read on this server"
            raise ApiError(500, reason, None, "adapter_unreadable") from error
        return pack(files, adapter.created_at)

    def create_merge(
        self, request: MergeCreateRequest, tenant: Tenant, idempotency_key: str | None = None
    ) -> AdapterMerge:
        """Queue a merge, once for each idempotency key.

        Raises:
            ApiError: its adapters cannot be merged in this way.
            TooManyMergesError: too many wait.
            QuotaExceededError, InsufficientStorageError: there is no room for its result.
        """
        return create_once(
            self.store,
            tenant,
            "merges",
            idempotency_key,
            lambda: request.model_dump_json().encode(),
            lambda claim: self._create_merge(request, tenant, claim),
            lambda merge_id: self.store.merges.get(merge_id, tenant.organization_id),
        )

    def _create_merge(
        self, request: MergeCreateRequest, tenant: Tenant, claim: IdempotencyClaim | None
    ) -> AdapterMerge:
        organization = tenant.organization_id
        adapters = [self._merged(a.name, i, tenant) for i, a in enumerate(request.adapters)]
        bases = {a.base_model for a in adapters}
        if not bases <= set(self.base_models):
            raise invalid(
                f"The adapters are of {', '.join(sorted(bases))}; this server serves "
                f"{', '.join(self.base_models)}",
                "adapters",
            )
        self._check_rank(request, [self._config(a, i) for i, a in enumerate(adapters)])
        # Of `cat` the result is as large as all of them, otherwise it is smaller.
        self._disk.check(sum(adapter_bytes(adapter) or 0 for adapter in adapters))
        merge_id = new_id("ftmerge")
        base_model = adapters[0].base_model
        name = adapter_name(base_model, organization, request.suffix, merge_id)
        return self.store.merges.create(
            merge_id, name, base_model, request.spec(), organization, tenant.quotas, claim
        )

    def _merged(self, name: str, index: int, tenant: Tenant) -> ServedAdapter:
        try:
            return self.get(name, tenant)
        except AdapterNotFoundError as error:
            where = f"adapters.{index}.name"
            raise ApiError(404, str(error), where, "model_not_found") from None

    def _config(self, adapter: ServedAdapter, index: int) -> AdapterConfig:
        try:
            return read_config(Path(adapter.path))
        except (OSError, AdapterFileError) as error:
            reason = f"The adapter '{adapter.name}' cannot be read: {error}"
            raise invalid(reason, f"adapters.{index}.name") from error

    def _check_rank(self, request: MergeCreateRequest, configs: list[AdapterConfig]) -> None:
        ranks = [config.max_rank for config in configs]
        smallest = self.base.smallest_features()
        if request.method == "cat":
            rank, reason = sum(ranks), "the sum of the adapters' ranks"
        elif request.method.endswith("svd"):
            rank, reason = request.svd_rank or max(ranks), "the rank of the result"
            if rank > smallest:
                raise invalid(
                    f"{reason} is {rank}, above the {smallest} columns of a matrix of this model",
                    "svd_rank",
                )
        else:
            rank, reason = ranks[0], "the rank"
            if len(set(ranks)) > 1:
                shown = ", ".join(map(str, ranks))
                raise invalid(
                    f"The adapters have the ranks {shown}; '{request.method}' needs one rank, use "
                    "cat or a method with svd",
                    "method",
                )
        if rank > self.max_lora_rank:
            where = "svd_rank" if request.method.endswith("svd") else "method"
            raise invalid(
                f"{reason} is {rank}, above this server's maximum of {self.max_lora_rank} "
                "(--finetuning-max-lora-rank)",
                where,
            )


def adapter_object(adapter: ServedAdapter) -> AdapterObject:
    """The object of an adapter, with what its files say."""
    folder = Path(adapter.path)
    r = alpha = modules = None
    try:
        config = read_config(folder)
        r, alpha = config.r, config.lora_alpha
        modules = None if config.target_modules is None else sorted(config.target_modules)
    except (OSError, AdapterFileError):
        pass
    return AdapterObject(
        id=adapter.name,
        created_at=adapter.created_at,
        source=adapter.source,
        job_id=adapter.job_id,
        base_model=adapter.base_model,
        r=r,
        lora_alpha=alpha,
        target_modules=modules,
        bytes=adapter_bytes(adapter),
        organization_id=adapter.organization_id,
    )


def adapter_bytes(adapter: ServedAdapter) -> int | None:
    """Size of an adapter's files, or None where they are not all there."""
    try:
        return sum((Path(adapter.path) / name).stat().st_size for name in _FILES)
    except OSError:
        return None
