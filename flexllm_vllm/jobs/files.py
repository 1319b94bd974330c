"""The files that users upload: a row and a plain file each."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Literal

from sqlalchemy import delete, insert, select

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import CursorNotFoundError, FileInUseError, FileNotStoredError
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.quotas import Quotas, check_file_quotas
from flexllm_vllm.jobs.rows import file_from_row, now
from flexllm_vllm.jobs.types import JobStatus, StoredFile

_UNFINISHED = tuple(status.value for status in JobStatus if not status.finished)


class FileStore:
    """Files under ``folder/<file id>``."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def create(
        self,
        source: BinaryIO,
        filename: str,
        purpose: str,
        check: Callable[[Path], object] | None = None,
        organization_id: str = schema.LOCAL_ORGANIZATION,
        expires_at: int | None = None,
        quotas: Quotas | None = None,
    ) -> StoredFile:
        """Copy ``source`` to disk. ``check`` may refuse the copy by raising: then nothing stays.

        Raises:
            QuotaExceededError: the organization may not store this.
        """
        file_id = new_id("file")
        path = self._folder / file_id
        partial = path.with_name(f".{file_id}.partial")
        try:
            with partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
                size = target.tell()
            if check is not None:
                check(partial)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        file = StoredFile(file_id, filename, size, purpose, now(), expires_at, organization_id)
        try:
            with self._database.write() as connection:
                if quotas is not None:
                    check_file_quotas(connection, organization_id, quotas, size)
                connection.execute(insert(schema.files).values(**asdict(file)))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return file

    def check_quotas(self, organization_id: str, quotas: Quotas, new_bytes: int) -> None:
        """Whether the organization may store a file of ``new_bytes`` more; to be asked before the
        bytes are read, since :meth:`create` asks after it.

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
        query = select(schema.files).where(schema.files.c.id == file_id)
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
            FileNotStoredError: no such file.
        """
        return self._folder / self.get(file_id, organization_id).id

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
        (self._folder / file_id).unlink(missing_ok=True)
