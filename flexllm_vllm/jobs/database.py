"""How a connection to the job store's database is opened, and the database brought up to date."""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL

from flexllm_vllm.jobs import migrations
from flexllm_vllm.jobs.schema import metadata

_BUSY_TIMEOUT_S = 30


class Database:
    """A SQLite file that several threads and processes share."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        self.path = path
        # Rebuilding a table would break the references to it: they are checked afterwards.
        upgrading = _engine(path, foreign_keys=False)
        try:
            _bring_up_to_date(upgrading, path)
        finally:
            upgrading.dispose()
        self.engine = _engine(path, foreign_keys=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and writes nothing."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its beginning, so that what it reads is
        still true when it writes."""
        with _writing(self.engine) as connection:
            yield connection

    def raw_connection(self) -> sqlite3.Connection:
        """A connection outside the pool, to be kept open; the caller closes it."""
        return sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()


def _writing(engine: Engine) -> AbstractContextManager[Connection]:
    return engine.execution_options(write=True).begin()


def _bring_up_to_date(engine: Engine, path: Path) -> None:
    """Creates the tables, or changes those of an older release.

    Raises:
        StoreVersionError: a newer release wrote them.
    """
    with _writing(engine) as connection:
        if inspect(connection).get_table_names():
            migrations.upgrade(connection, path)
        else:
            metadata.create_all(connection)
            migrations.stamp(connection)


def _engine(path: Path, foreign_keys: bool) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
        hide_parameters=True,  # an error that is logged must not show a webhook's secret
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so, in _begin
        # WAL: readers never wait for the writer. NORMAL survives a killed process.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
