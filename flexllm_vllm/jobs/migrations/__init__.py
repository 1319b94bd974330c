"""Changes of the store's tables from one release to the next, by Alembic.

A revision is a module in ``versions/``, numbered. The tables of ``schema.py`` are those of the
newest one: a fresh store is created from them, an older one is upgraded when it is first opened,
in one transaction. Revision 0001 is the schema of release 0.1, which had no revisions yet.
"""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, text

from flexllm_vllm.jobs.errors import StoreVersionError

_FIRST = "0001"
NEWEST = "0003"


def stamp(connection: Connection) -> None:
    """Says that the tables are those of the newest revision."""
    _write_revision(connection, NEWEST)


def upgrade(connection: Connection, path: Path) -> None:
    """Brings the tables to the newest revision.

    Raises:
        StoreVersionError: they are of a newer release.
    """
    revision = _revision(connection)
    if revision == NEWEST:
        return
    if revision is None or revision > NEWEST:
        raise StoreVersionError(
            f"{path} has schema version {revision}, this package reads up to {NEWEST}: use the "
            "release that wrote it, or another folder"
        )
    _run(connection)
    if broken := connection.execute(text("PRAGMA foreign_key_check")).all():
        raise StoreVersionError(
            f"{path} cannot be upgraded: rows without their owner, {broken[:3]}"
        )


def _revision(connection: Connection) -> str | None:
    tables = inspect(connection).get_table_names()
    if "alembic_version" in tables:
        return connection.scalar(text("SELECT version_num FROM alembic_version"))
    if "schema_version" not in tables:
        return None
    if connection.scalar(text("SELECT version FROM schema_version")) != 1:
        return None
    connection.execute(text("DROP TABLE schema_version"))
    _write_revision(connection, _FIRST)
    return _FIRST


def _write_revision(connection: Connection, revision: str) -> None:
    connection.execute(
        text("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY NOT NULL)")
    )
    connection.execute(text("INSERT INTO alembic_version VALUES (:r)"), {"r": revision})


def _run(connection: Connection) -> None:
    # Only a store that is upgraded pays for the import.
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(__file__).parent))

    def revisions(current: Any, _context: Any) -> Any:
        return scripts._upgrade_revs(NEWEST, current)

    with EnvironmentContext(Config(), scripts, fn=revisions) as environment:
        environment.configure(connection=connection, render_as_batch=True)
        environment.run_migrations()
