"""The tables of the job store, and how a connection to them is opened."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.engine import URL

from flexllm_vllm.jobs.errors import StoreVersionError

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 30

metadata = MetaData()


def _table(name: str, *columns: Any) -> Table:
    """A table whose ``seq`` orders its rows by creation and is never used twice."""
    seq = Column("seq", Integer, primary_key=True)
    return Table(name, metadata, seq, *columns, sqlite_autoincrement=True)


schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

files = _table(
    "files",
    Column("id", String, nullable=False, unique=True),
    Column("filename", String, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("purpose", String, nullable=False),
    Column("created_at", Integer, nullable=False),
)

jobs = _table(
    "jobs",
    Column("id", String, nullable=False, unique=True),
    Column("model", String, nullable=False),
    Column("status", String, nullable=False, index=True),
    # Not a foreign key: the file of a finished job may be deleted.
    Column("training_file", String, nullable=False, index=True),
    Column("suffix", String),
    Column("lora", JSON, nullable=False),
    Column("training", JSON, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("started_at", Integer),
    Column("finished_at", Integer),
    Column("trained_tokens", Integer, nullable=False, default=0),
    Column("step", Integer, nullable=False, default=0),
    Column("total_steps", Integer, nullable=False),
    Column("adapter_name", String, nullable=False, unique=True),
    Column("init_adapter_path", String),
    Column("error", JSON(none_as_null=True)),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("owner", String),  # the engine that runs it: see owner.py
    Column("organization_id", String, nullable=False),
    Column("metadata", JSON(none_as_null=True)),
)

events = _table(
    "events",
    Column("id", String, nullable=False, unique=True),
    Column("job_id", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("level", String, nullable=False),
    Column("message", String, nullable=False),
    Column("type", String, nullable=False),
    Column("data", JSON(none_as_null=True)),
)
Index("events_of_job", events.c.job_id, events.c.seq)

adapters = _table(
    "adapters",
    Column("name", String, nullable=False, unique=True),
    Column("int_id", Integer, nullable=False, unique=True),
    Column("path", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("job_id", String, ForeignKey("jobs.id"), nullable=False),
    Column("created_at", Integer, nullable=False),
)


class Database:
    """A SQLite file that several threads and processes share."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        self.path = path
        self.engine = create_engine(
            URL.create("sqlite", database=str(path)),
            connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
        )
        _set_up(self.engine)
        self._create_tables()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and writes nothing."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its beginning, so that what it reads is
        still true when it writes."""
        with self.engine.execution_options(write=True).begin() as connection:
            yield connection

    def raw_connection(self) -> sqlite3.Connection:
        """A connection outside the pool, to be kept open; the caller closes it."""
        return sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()

    def _create_tables(self) -> None:
        with self.write() as connection:
            metadata.create_all(connection)
            version = connection.scalar(select(schema_version.c.version))
            if version is None:
                connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise StoreVersionError(
                    f"{self.path} has schema version {version}, this package reads version "
                    f"{SCHEMA_VERSION}: use the version that wrote it, or another folder"
                )


def _set_up(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so, in _begin
        # WAL: readers never wait for the writer. NORMAL survives a killed process.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
