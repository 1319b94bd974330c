"""Uploads in parts: a file that comes piece by piece and is put together at the end."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.content import ContentFolder, PartialFile
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import UploadMismatchError, UploadNotFoundError, UploadStateError
from flexllm_vllm.jobs.file_types import StoredFile, Upload, UploadPart, UploadStatus
from flexllm_vllm.jobs.files import FileStore, check_file_count
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.quotas import Quotas, check_file_quotas
from flexllm_vllm.jobs.rows import now, upload_from_row

# Seconds in which an upload must be completed.
EXPIRES_AFTER_S = 3600
MAX_PARTS = 10_000
# A client that gets no answer sends a part again; the stock one does so twice.
_COPIES = 3
# Seconds that an upload which has ended is remembered, to say so to a client that comes late.
_REMEMBERED_S = 24 * 3600
_COPY_BYTES = 1 << 20


class UploadStore:
    """Uploads; their parts lie under ``folder/<part id>`` until the upload ends."""

    def __init__(self, database: Database, folder: Path, files: FileStore) -> None:
        self._database = database
        self._content = ContentFolder(folder)
        self._files = files

    def create(
        self,
        filename: str,
        num_bytes: int,
        purpose: str,
        mime_type: str,
        organization_id: str = schema.LOCAL_ORGANIZATION,
        file_expires_after_s: int | None = None,
        max_files: int | None = None,
        quotas: Quotas | None = None,
    ) -> Upload:
        """Announce a file of ``num_bytes``.

        Raises:
            TooManyFilesError: see :func:`check_file_count`.
            QuotaExceededError: the organization may not store the file.
        """
        created = now()
        upload = Upload(
            id=new_id("upload", "_"),
            filename=filename,
            bytes=num_bytes,
            purpose=purpose,
            mime_type=mime_type,
            status=UploadStatus.PENDING,
            created_at=created,
            expires_at=created + EXPIRES_AFTER_S,
            file_expires_after_s=file_expires_after_s,
            organization_id=organization_id,
        )
        with self._database.write() as connection:
            if max_files is not None:
                check_file_count(connection, max_files)
            if quotas is not None:
                check_file_quotas(connection, organization_id, quotas, num_bytes)
            connection.execute(insert(schema.uploads).values(**asdict(upload)))
        return upload

    def get(self, upload_id: str, organization_id: str | None = None) -> Upload:
        """The upload of this id; ``organization_id`` limits the look to one tenant, here and below.

        Raises:
            UploadNotFoundError: no such upload.
        """
        with self._database.read() as connection:
            return _get(connection, upload_id, organization_id)

    def begin_part(self, upload_id: str, organization_id: str | None = None) -> PartialFile:
        """A part to be written and then added.

        Raises:
            UploadNotFoundError, UploadStateError: the upload takes no parts.
        """
        with self._database.read() as connection:
            _pending(connection, upload_id, organization_id, "it takes no more parts")
        return self._content.begin(new_id("part", "_"))

    def add_part(self, upload_id: str, partial: PartialFile) -> UploadPart:
        """Make a part of what was written.

        Raises:
            UploadNotFoundError, UploadStateError: the upload has ended meanwhile.
            UploadMismatchError: the upload has enough parts.
        """
        partial.sync()
        table = schema.upload_parts
        part = UploadPart(partial.id, upload_id, partial.size, now())
        sums = select(func.count(), func.coalesce(func.sum(table.c.bytes), 0))
        with partial.publishing(), self._database.write() as connection:
            upload = _pending(connection, upload_id, None, "it takes no more parts")
            count, size = connection.execute(sums.where(table.c.upload_id == upload_id)).one()
            if count >= MAX_PARTS:
                raise UploadMismatchError(f"An upload has at most {MAX_PARTS} parts", "data")
            if size + part.bytes > _COPIES * upload.bytes:
                raise UploadMismatchError(
                    f"The parts of {upload_id} have {size} bytes and this one has {part.bytes}: "
                    f"that is more than {_COPIES} times the {upload.bytes} bytes of the upload",
                    "data",
                )
            connection.execute(insert(table).values(**asdict(part)))
            partial.publish()
        return part

    def complete(
        self,
        upload_id: str,
        part_ids: Sequence[str],
        md5: str | None = None,
        check: Callable[[Path], object] | None = None,
        organization_id: str | None = None,
    ) -> tuple[Upload, StoredFile]:
        """Put the parts together, in the order of ``part_ids``; parts that are not named go.

        ``check`` may refuse the file by raising: then the upload stays as it is.

        Args:
            md5: of the file, in hexadecimal digits.

        Raises:
            UploadNotFoundError, UploadStateError: the upload has ended.
            UploadMismatchError: the parts do not make the file that was announced.
        """
        with self._database.read() as connection:
            upload = _pending(connection, upload_id, organization_id, "it cannot be completed")
            sizes = _part_sizes(connection, upload_id)
        _check_parts(upload, part_ids, sizes)
        with self._files.begin() as partial:
            try:
                found = self._join(part_ids, partial)
            except FileNotFoundError:  # it has ended since, and its parts are gone
                with self._database.read() as connection:
                    _pending(connection, upload_id, None, "it cannot be completed")
                message = f"A part of {upload_id} is gone from the server's disk: add it again"
                raise UploadMismatchError(message, "part_ids") from None
            if md5 is not None and md5.lower() != found:
                raise UploadMismatchError(f"The file's md5 is {found}, not {md5[:40]}", "md5")
            partial.sync()
            if check is not None:
                check(partial.path)
            parts: list[str] = []

            def end(connection: Connection, file: StoredFile) -> None:
                _pending(connection, upload_id, None, "it cannot be completed")
                parts.extend(_end(connection, upload_id, UploadStatus.COMPLETED, file.id))

            file = self._files.add(
                partial,
                upload.filename,
                upload.purpose,
                upload.organization_id,
                upload.file_expires_after_s,
                within=end,
            )
        self._content.remove(parts)
        return self.get(upload_id), file

    def cancel(self, upload_id: str, organization_id: str | None = None) -> Upload:
        """End an upload and remove its parts.

        Raises:
            UploadNotFoundError, UploadStateError: it has ended.
        """
        with self._database.write() as connection:
            _pending(connection, upload_id, organization_id, "it cannot be cancelled")
            parts = _end(connection, upload_id, UploadStatus.CANCELLED)
            upload = _get(connection, upload_id)
        self._content.remove(parts)
        return upload

    def sweep(self) -> None:
        """Remove the parts of uploads whose time is over; forget those that ended long ago."""
        table = schema.uploads
        pending = table.c.status == UploadStatus.PENDING.value
        over = select(table.c.id).where(pending, table.c.expires_at <= now())
        forgotten = ~pending & (table.c.expires_at <= now() - _REMEMBERED_S)
        with self._database.read() as connection:
            if (
                connection.scalar(over.limit(1)) is None
                and connection.scalar(select(table.c.id).where(forgotten).limit(1)) is None
            ):
                return
        parts: list[str] = []
        with self._database.write() as connection:
            for upload_id in list(connection.scalars(over)):
                parts += _end(connection, upload_id, UploadStatus.EXPIRED)
            connection.execute(delete(table).where(forgotten))
        self._content.remove(parts)

    def remove_leftovers(self) -> int:
        """Remove what processes that died left; returns the number of files."""

        def known() -> set[str]:
            with self._database.read() as connection:
                return set(connection.scalars(select(schema.upload_parts.c.id)))

        return self._content.remove_leftovers(known)

    def _join(self, part_ids: Sequence[str], target: PartialFile) -> str:
        """Copies the parts; returns the md5 of all."""
        md5 = hashlib.md5(usedforsecurity=False)
        for part_id in part_ids:
            with self._content.path(part_id).open("rb") as source:
                while piece := source.read(_COPY_BYTES):
                    md5.update(piece)
                    target.write(piece)
        return md5.hexdigest()


def _get(connection: Connection, upload_id: str, organization_id: str | None = None) -> Upload:
    table = schema.uploads
    query = select(table).where(table.c.id == upload_id)
    if organization_id is not None:
        query = query.where(table.c.organization_id == organization_id)
    row: Row[Any] | None = connection.execute(query).one_or_none()
    if row is None:
        raise UploadNotFoundError(upload_id)
    return upload_from_row(row)


def _pending(
    connection: Connection, upload_id: str, organization_id: str | None, wanted: str
) -> Upload:
    upload = _get(connection, upload_id, organization_id)
    if upload.status is not UploadStatus.PENDING:
        raise UploadStateError(upload_id, upload.status, wanted)
    return upload


def _end(
    connection: Connection, upload_id: str, status: UploadStatus, file_id: str | None = None
) -> list[str]:
    """Ends an upload; returns its parts, which have no rows any more."""
    uploads, parts = schema.uploads, schema.upload_parts
    ids = list(_part_sizes(connection, upload_id))
    connection.execute(delete(parts).where(parts.c.upload_id == upload_id))
    values = {"status": status.value, "file_id": file_id}
    connection.execute(update(uploads).where(uploads.c.id == upload_id).values(**values))
    return ids


def _part_sizes(connection: Connection, upload_id: str) -> dict[str, int]:
    parts = schema.upload_parts
    query = select(parts.c.id, parts.c.bytes).where(parts.c.upload_id == upload_id)
    return {row.id: row.bytes for row in connection.execute(query)}


def _check_parts(upload: Upload, part_ids: Sequence[str], sizes: dict[str, int]) -> None:
    for part_id in part_ids:
        if part_id not in sizes:
            message = f"Upload {upload.id} has no part '{part_id[:80]}'"
            raise UploadMismatchError(message, "part_ids")
    if len(set(part_ids)) != len(part_ids):
        raise UploadMismatchError("A part is named twice", "part_ids")
    size = sum(sizes[part_id] for part_id in part_ids)
    if size != upload.bytes:
        raise UploadMismatchError(
            f"The parts have {size} bytes together, and the upload was created for {upload.bytes}",
            "part_ids",
        )
