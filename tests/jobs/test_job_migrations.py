import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from flexllm_vllm.jobs import JobStatus, JobStore, StoreVersionError, schema

V1 = Path(__file__).parent / "data" / "store_v1.sql"


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """A store that release 0.1 wrote: a job that succeeded and one that is queued."""
    root = tmp_path / "store"
    root.mkdir()
    with sqlite3.connect(root / "store.db") as connection:
        connection.executescript(V1.read_text())
    connection.close()
    return root


def test_a_store_of_the_first_release_is_upgraded(old_store: Path) -> None:
    with JobStore(old_store) as store:
        jobs, _ = store.list_jobs()
        assert [job.status for job in jobs] == [JobStatus.QUEUED, JobStatus.SUCCEEDED]
        adapter = store.adapters.get("ft:demo:local::0")
        assert adapter is not None
        assert (adapter.int_id, adapter.source) == (1_000_000, "job")
        assert len(store.list_events(jobs[1].id)[0]) == 4
        claimed = store.claim_next_job()
        assert claimed is not None
        assert claimed.id == jobs[0].id


def test_an_upgraded_store_has_the_tables_of_a_fresh_one(old_store: Path, tmp_path: Path) -> None:
    def tables(root: Path) -> dict[str, set[tuple[object, ...]]]:
        found = {}
        with JobStore(root) as store, store._database.read() as connection:
            assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
            for name in schema.metadata.tables:
                columns = connection.execute(text(f"PRAGMA table_info({name})")).all()
                found[name] = {tuple(column[1:]) for column in columns}
                indexes = connection.execute(text(f"PRAGMA index_list({name})")).all()
                found[name] |= {(i[1], i[2]) for i in indexes if not i[1].startswith("sqlite_")}
        return found

    assert tables(old_store) == tables(tmp_path / "fresh")


def test_a_failed_upgrade_leaves_the_old_store(old_store: Path) -> None:
    with sqlite3.connect(old_store / "store.db") as connection:
        connection.execute("CREATE TABLE webhook_endpoints (x)")
    connection.close()
    with pytest.raises(Exception, match="webhook_endpoints"):
        JobStore(old_store)
    with sqlite3.connect(old_store / "store.db") as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchone() == (1,)
        connection.execute("DROP TABLE webhook_endpoints")
    connection.close()
    with JobStore(old_store) as store:
        assert len(store.list_jobs()[0]) == 2


@pytest.mark.parametrize("statement", [
    "UPDATE schema_version SET version = 99",
    "DROP TABLE schema_version",
])  # fmt: skip
def test_a_store_of_another_package_is_refused(old_store: Path, statement: str) -> None:
    with sqlite3.connect(old_store / "store.db") as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(StoreVersionError):
        JobStore(old_store)


def test_a_store_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    with JobStore(tmp_path) as store, store._database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreVersionError, match="9999"):
        JobStore(tmp_path)


def test_a_store_without_trackers_gets_them(tmp_path: Path) -> None:
    JobStore(tmp_path).close()
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("DROP TABLE trackers")
        connection.execute("UPDATE alembic_version SET version_num = '0002'")
    connection.close()
    with JobStore(tmp_path) as store:
        assert store.trackers.claim(1) == []
        with store._database.read() as connection:
            assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
