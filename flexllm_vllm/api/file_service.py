"""The rules of files and uploads, without HTTP."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection

from flexllm_vllm.api.errors import ApiError, invalid
from flexllm_vllm.api.idempotency import create_once
from flexllm_vllm.api.limits import MAX_PART_BYTES, LimitedFile, Limits, check_size
from flexllm_vllm.api.tenants import Tenant
from flexllm_vllm.api.upload_requests import (
    FileCreateRequest,
    UploadCompleteRequest,
    UploadCreateRequest,
)
from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.records import check_file
from flexllm_vllm.jobs.disk import DiskSpace
from flexllm_vllm.jobs.file_types import StoredFile, Upload, UploadPart
from flexllm_vllm.jobs.idempotency import IdempotencyClaim, complete_claim
from flexllm_vllm.jobs.store import JobStore


class FileService:
    """Takes files in, within the limits. Its methods block: call them from a worker thread."""

    def __init__(self, store: JobStore, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._disk = DiskSpace(store.root, limits.max_disk_bytes)

    def begin_file(
        self, announced: int, tenant: Tenant, idempotency_key: str | None = None
    ) -> LimitedFile:
        """A place for the content of a file of at least ``announced`` bytes, to be written and
        then given to :meth:`create_file`.

        Raises:
            ApiError, TooManyFilesError, QuotaExceededError, InsufficientStorageError: there is
                none.
        """
        self._store.sweep()
        check_size(announced, self._limits.max_file_bytes, "file")
        if idempotency_key is None:  # with one, the file may be there and counted already
            self._store.files.check_count(self._limits.max_files)
            self._store.files.check_quotas(tenant.organization_id, tenant.quotas, announced)
        self._disk.check(announced)
        partial = self._store.files.begin()
        return LimitedFile(partial, self._limits.max_file_bytes, "file", self._disk)

    def create_file(
        self,
        content: LimitedFile,
        request: FileCreateRequest,
        tenant: Tenant,
        idempotency_key: str | None = None,
    ) -> StoredFile:
        """Check every line of what was written and keep it, once for each idempotency key.

        Raises:
            ApiError: a line is no example (named), or there are too many.
            TooManyFilesError, QuotaExceededError, InsufficientStorageError: others came first.
        """

        def fingerprint() -> bytes:
            content.partial.sync()
            with content.partial.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return json.dumps([request.model_dump(mode="json"), digest]).encode()

        return create_once(
            self._store,
            tenant,
            "files",
            idempotency_key,
            fingerprint,
            lambda claim: self._create_file(content, request, tenant, claim),
            lambda file_id: self._store.files.get(file_id, tenant.organization_id),
        )

    def _create_file(
        self,
        content: LimitedFile,
        request: FileCreateRequest,
        tenant: Tenant,
        claim: IdempotencyClaim | None,
    ) -> StoredFile:
        def complete(connection: Connection, file: StoredFile) -> None:
            if claim is not None:
                complete_claim(connection, claim, file.id)

        content.partial.sync()
        self._check_examples(content.partial.path)
        self._disk.check()
        return self._store.files.add(
            content.partial,
            request.filename,
            request.purpose,
            tenant.organization_id,
            request.expires_after_s,
            self._limits.max_files,
            tenant.quotas,
            within=complete,
        )

    def create_upload(self, request: UploadCreateRequest, tenant: Tenant) -> Upload:
        """Announce a file that comes in parts.

        Raises:
            ApiError, TooManyFilesError, QuotaExceededError, InsufficientStorageError: there is no
                place for it.
        """
        self._store.sweep()
        check_size(request.bytes, self._limits.max_file_bytes, "bytes")
        self._disk.check(request.bytes)
        return self._store.uploads.create(
            request.filename,
            request.bytes,
            request.purpose,
            request.mime_type,
            tenant.organization_id,
            request.expires_after_s,
            self._limits.max_files,
            tenant.quotas,
        )

    def begin_part(self, upload_id: str, announced: int, tenant: Tenant) -> LimitedFile:
        """A place for a part of at least ``announced`` bytes, for :meth:`create_part`.

        Raises:
            ApiError, InsufficientStorageError: there is none.
            UploadNotFoundError, UploadStateError: the upload takes no parts.
        """
        self._store.sweep()
        check_size(announced, MAX_PART_BYTES, "data")
        self._disk.check(announced)
        partial = self._store.uploads.begin_part(upload_id, tenant.organization_id)
        return LimitedFile(partial, MAX_PART_BYTES, "data", self._disk)

    def create_part(self, upload_id: str, content: LimitedFile) -> UploadPart:
        """Keep what was written as a part.

        Raises:
            ApiError: it is empty.
            UploadNotFoundError, UploadStateError, UploadMismatchError, InsufficientStorageError.
        """
        if content.partial.size == 0:
            raise invalid("'data' is empty", "data")
        self._disk.check()
        return self._store.uploads.add_part(upload_id, content.partial)

    def complete_upload(
        self, upload_id: str, request: UploadCompleteRequest, tenant: Tenant
    ) -> tuple[Upload, StoredFile]:
        """Put a file together from its parts and check every line.

        Raises:
            ApiError: a line is no example (named), or there are too many: the upload stays as it
                is.
            UploadNotFoundError, UploadStateError, UploadMismatchError, InsufficientStorageError.
        """
        upload = self._store.uploads.get(upload_id, tenant.organization_id)
        self._disk.check(upload.bytes)
        return self._store.uploads.complete(
            upload_id,
            request.part_ids,
            request.md5,
            self._check_examples,
            tenant.organization_id,
        )

    def check_job(self, training_file: Path) -> None:
        """Whether there is room for one more job, in the queue and on the disk.

        Raises:
            TooManyQueuedJobsError, InsufficientStorageError.
        """
        self._store.check_queue(self._limits.max_queued_jobs)
        with suppress(FileNotFoundError):  # deleted meanwhile: said where it is read
            self._disk.check(training_file.stat().st_size)  # its tokens take about as much

    def _check_examples(self, path: Path) -> None:
        try:
            count = check_file(path)
        except DataError as error:
            text = str(error)
            message = f"Invalid file format. {text[0].upper()}{text[1:]}"
            raise invalid(message, "file", "invalid_file") from None
        most = self._limits.max_examples
        if count > most:
            message = f"The file has {count} examples, and the limit is {most}"
            raise ApiError(413, message, "file", "too_many_examples")
