"""The files that users upload: a row and a plain file each."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sqlalchemy import ColumnElement, Connection, delete, func, insert, or_, select

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.content import ContentFolder, PartialFile
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import (
    CursorNotFoundError,
    FileInUseError,
    FileNotStoredError,
    TooManyFilesError,
)
from flexllm_vllm.jobs.file_types import StoredFile, UploadStatus
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.quotas import Quotas, check_file_quotas
from flexllm_vllm.jobs.rows import file_from_row, now
from flexllm_vllm.jobs.types import JobStatus

# What users upload; files of other purposes are ours.
UPLOADED = "fine-tune"

_UNFINISHED = tuple(status.value for status in JobStatus if not status.finished)


class FileStore:
    """Files under ``folder/<file id>``. A file whose time is over is not found any more."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._content = ContentFolder(folder)

    def begin(self) -> PartialFile:
        """A file to be written and then added; until then it lies beside the others."""
        return self._content.begin(new_id("file"))

    def add(
        self,
        partial: PartialFile,
        filename: str,
        purpose: str,
        organization_id: str = schema.LOCAL_ORGANIZATION,
        expires_after_s: int | None = None,
        max_files: int | None = None,
        quotas: Quotas | None = None,
        within: Callable[[Connection, StoredFile], None] | None = None,
    ) -> StoredFile:
        """Make a file of what was written.

        Args:
            max_files: see :func:`check_file_count`.
            quotas: of the organization.
            within: what else belongs into the transaction; may refuse the file by raising.

        Raises:
            TooManyFilesError, QuotaExceededError, OSError.
        """
        partial.sync()
        created = now()
        expires_at = None if expires_after_s is None else created + expires_after_s
        file = StoredFile(
            partial.id, filename, partial.size, purpose, created, expires_at, organization_id
        )
        with partial.publishing(), self._database.write() as connection:
            if max_files is not None:
                check_file_count(connection, max_files)
            if quotas is not None:
                check_file_quotas(connection, organization_id, quotas, partial.size)
            connection.execute(insert(schema.files).values(**asdict(file)))
            if within is not None:
                within(connection, file)
            partial.publish()
        return file

    def create(
        self,
        source: BinaryIO,
        filename: str,
        purpose: str,
        check: Callable[[Path], object] | None = None,
        organization_id: str = schema.LOCAL_ORGANIZATION,
        quotas: Quotas | None = None,
    ) -> StoredFile:
        """Copy ``source`` to disk. ``check`` may refuse the copy by raising: then nothing stays."""
        with self.begin() as partial:
            shutil.copyfileobj(source, partial, 1 << 20)
            if check is not None:
                partial.sync()
                check(partial.path)
            return self.add(partial, filename, purpose, organization_id, quotas=quotas)

    def check_count(self, max_files: int) -> None:
        """See :func:`check_file_count`."""
        with self._database.read() as connection:
            check_file_count(connection, max_files)

    def check_quotas(self, organization_id: str, quotas: Quotas, new_bytes: int) -> None:
        """Whether the organization may store a file of ``new_bytes`` more; to be asked before the
        bytes are read, since :meth:`add` asks after it.

        Raises:
            QuotaExceededError: names the quota.
        """
        with self._database.read() as connection:
            check_file_quotas(connection, organization_id, quotas, new_bytes)

    def get(self, file_id: str, organization_id: str | None = None) -> StoredFile:
        """The file of this id; ``organization_id`` limits the look to one tenant, here and below.

        Raises:
            FileNotStoredError: no such file.
        """
        query = select(schema.files).where(schema.files.c.id == file_id, _exists())
        if organization_id is not None:
            query = query.where(schema.files.c.organization_id == organization_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise FileNotStoredError(file_id)
        return file_from_row(row)

    def path(self, file_id: str, organization_id: str | None = None) -> Path:
        """Where the content lies.

        Raises:
            FileNotStoredError: no such file, or its content is gone from the disk.
        """
        path = self._content.path(self.get(file_id, organization_id).id)
        if not path.is_file():
            raise FileNotStoredError(file_id)
        return path

    def open(self, file_id: str, organization_id: str | None = None) -> BinaryIO:
        """The content, which stays readable whatever becomes of the file.

        Raises:
            FileNotStoredError: no such file, or its content is gone from the disk.
        """
        try:
            return self.path(file_id, organization_id).open("rb")
        except FileNotFoundError:
            raise FileNotStoredError(file_id) from None

    def page(
        self,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
        organization_id: str | None = None,
    ) -> tuple[list[StoredFile], bool]:
        """Files by creation time, and whether there are more.

        Raises:
            CursorNotFoundError: no file has the id ``after``.
        """
        table = schema.files
        query = select(table).order_by(table.c.seq.desc() if order == "desc" else table.c.seq)
        query = query.where(_exists())
        if purpose is not None:
            query = query.where(table.c.purpose == purpose)
        if organization_id is not None:
            query = query.where(table.c.organization_id == organization_id)
        with self._database.read() as connection:
            if after is not None:
                seq = connection.scalar(
                    query.with_only_columns(table.c.seq).where(table.c.id == after)
                )
                if seq is None:
                    raise CursorNotFoundError(after)
                query = query.where(table.c.seq < seq if order == "desc" else table.c.seq > seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        return [file_from_row(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str, organization_id: str | None = None) -> None:
        """Delete row and content.

        Raises:
            FileNotStoredError: no such file.
            FileInUseError: a job that needs it has not finished.
        """
        self.get(file_id, organization_id)
        jobs = schema.jobs
        of_file = (jobs.c.training_file == file_id) | (jobs.c.validation_file == file_id)
        with self._database.write() as connection:
            users = connection.scalars(
                select(jobs.c.id).where(of_file, jobs.c.status.in_(_UNFINISHED))
            ).all()
            if users:
                raise FileInUseError(file_id, list(users))
            done = connection.execute(delete(schema.files).where(schema.files.c.id == file_id))
            if done.rowcount == 0:
                raise FileNotStoredError(file_id)
        self._content.remove([file_id])

    def sweep(self) -> None:
        """Remove files whose time is over, once no unfinished job needs them."""
        table, jobs = schema.files, schema.jobs
        of_file = (jobs.c.training_file == table.c.id) | (jobs.c.validation_file == table.c.id)
        in_use = select(jobs.c.id).where(of_file, jobs.c.status.in_(_UNFINISHED)).exists()
        over = select(table.c.id).where(table.c.expires_at <= now(), ~in_use)
        with self._database.read() as connection:
            if connection.scalar(over.limit(1)) is None:
                return
        with self._database.write() as connection:
            ids = list(connection.scalars(over))
            connection.execute(delete(table).where(table.c.id.in_(ids)))
        self._content.remove(ids)

    def remove_leftovers(self) -> int:
        """Remove what processes that died left; returns the number of files."""

        def known() -> set[str]:
            with self._database.read() as connection:
                return set(connection.scalars(select(schema.files.c.id)))

        return self._content.remove_leftovers(known)


def check_file_count(connection: Connection, max_files: int) -> None:
    """Whether there may be one more of the files that users upload. An upload that is not complete
    counts as a file.

    Raises:
        TooManyFilesError: there may not.
    """
    files, uploads = schema.files, schema.uploads
    pending = (uploads.c.status == UploadStatus.PENDING.value) & (uploads.c.expires_at > now())
    count = connection.scalar(_count(files, _exists() & (files.c.purpose == UPLOADED))) or 0
    count += connection.scalar(_count(uploads, pending)) or 0
    if count >= max_files:
        raise TooManyFilesError(max_files)


def _count(table: Any, condition: ColumnElement[bool]) -> Any:
    return select(func.count()).select_from(table).where(condition)


def _exists() -> ColumnElement[bool]:
    expires_at = schema.files.c.expires_at
    return or_(expires_at.is_(None), expires_at > now())
