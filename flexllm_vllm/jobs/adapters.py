"""Adapters that requests may name as their model: a row here, a PEFT folder on disk."""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import AdapterNotFoundError
from flexllm_vllm.jobs.rows import adapter_from_row, now
from flexllm_vllm.jobs.types import (
    FIRST_SERVED_INT_ID,
    AdapterSource,
    ServedAdapter,
)


class AdapterStore:
    """The adapters of all jobs, checkpoints, imports and merges."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        name: str,
        path: Path,
        base_model: str,
        source: AdapterSource,
        organization_id: str = schema.LOCAL_ORGANIZATION,
    ) -> ServedAdapter:
        """Serve a PEFT folder under a name; the id that vLLM loads it by is new.

        Raises:
            sqlalchemy.exc.IntegrityError: the name is taken.
        """
        with self._database.write() as connection:
            return add_adapter(connection, name, path, base_model, source, organization_id)

    def get(self, name: str, organization_id: str | None = None) -> ServedAdapter | None:
        """The adapter of this name; ``organization_id`` limits the look to one tenant."""
        query = select(schema.adapters).where(schema.adapters.c.name == name)
        if organization_id is not None:
            query = query.where(schema.adapters.c.organization_id == organization_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else adapter_from_row(row)

    def all(self, organization_id: str | None = None) -> list[ServedAdapter]:
        """All adapters, oldest first."""
        query = select(schema.adapters).order_by(schema.adapters.c.seq)
        if organization_id is not None:
            query = query.where(schema.adapters.c.organization_id == organization_id)
        with self._database.read() as connection:
            return [adapter_from_row(row) for row in connection.execute(query)]

    def delete(self, name: str, organization_id: str | None = None) -> ServedAdapter:
        """Stop serving an adapter. Its folder is the caller's to remove.

        Raises:
            AdapterNotFoundError: no adapter of this name.
        """
        table = schema.adapters
        query = select(table).where(table.c.name == name)
        if organization_id is not None:
            query = query.where(table.c.organization_id == organization_id)
        with self._database.write() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                raise AdapterNotFoundError(name)
            connection.execute(delete(table).where(table.c.seq == row.seq))
            return adapter_from_row(row)


def add_adapter(
    connection: Connection,
    name: str,
    path: Path,
    base_model: str,
    source: AdapterSource,
    organization_id: str,
    **columns: Any,
) -> ServedAdapter:
    """Insert an adapter within a transaction, under an id that no other one ever has.

    vLLM's API processes each count the adapters that they load from 1, and a worker loads an id
    only once: two adapters of one id would get each other's weights.
    """
    table = schema.adapters
    # AUTOINCREMENT: numbers of deleted rows are not given again; a worker may still hold them.
    issued = connection.exec_driver_sql(
        "SELECT seq FROM sqlite_sequence WHERE name = 'adapters'"
    ).scalar()
    values = {
        "name": name,
        "int_id": FIRST_SERVED_INT_ID + (issued or 0),
        "path": str(path),
        "base_model": base_model,
        "created_at": now(),
        "source": source,
        "organization_id": organization_id,
        **columns,
    }
    connection.execute(insert(table).values(**values))
    row = connection.execute(select(table).where(table.c.name == name)).one()
    return adapter_from_row(row)
