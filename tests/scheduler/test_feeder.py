"""The engine's thread at the store, on a disk that is full for a while."""

import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from flexllm_vllm.data.dataset import DatasetBuilder
from flexllm_vllm.jobs import JobStore, LoraSpec, NewJob, TrainingSpec
from flexllm_vllm.jobs.types import DATASET_FILE, FinetuningJob, JobStatus
from flexllm_vllm.plan import JobFailure
from flexllm_vllm.scheduler import feeder as feeder_module
from flexllm_vllm.scheduler.feeder import POLL_INTERVAL, JobFeeder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path) as store:
        yield store


@pytest.fixture
def feeder(tmp_path: Path) -> Iterator[JobFeeder]:
    feeder = JobFeeder(tmp_path, 2, ["demo"], lambda: None)
    yield feeder
    feeder.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def submit(store: JobStore, with_data: bool = True) -> FinetuningJob:
    job_id, folder = store.new_job()
    builder = DatasetBuilder()
    builder.add([1, 2, 3], [0, 1, 1])
    if with_data:
        builder.build().save(folder / DATASET_FILE)
    file = store.files.create(io.BytesIO(b"x"), "a", "fine-tune")
    training = TrainingSpec(batch_size=1, max_seq_length=8, seed=0)
    new = NewJob(job_id, "demo", f"ft:{job_id}", file.id, LoraSpec(), training, 9, {})
    return store.create_job(new)


def claim(store: JobStore, feeder: JobFeeder) -> FinetuningJob:
    job = submit(store)
    wait_until(lambda: feeder.has_news)
    [claimed] = feeder.take_jobs()
    assert claimed.job.id == job.id
    return claimed.job


class FullDisk:
    """SQLite may not grow the database any more: "database or disk is full"."""

    def __init__(self, feeder: JobFeeder) -> None:
        self._engine = feeder._store._database.engine
        self.is_full = True
        event.listen(self._engine, "begin", self._limit)

    def _limit(self, connection: object) -> None:
        pages = 1 if self.is_full else 1 << 30
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")  # no less than it has


def record(store: JobStore, job_id: str, step: int) -> None:
    store.record_step(job_id, step, {"train_loss": 1.0, "padding": "x" * 20_000})


def steps(store: JobStore, job_id: str) -> list[int]:
    return [event["step"] for event in store.metrics_events(job_id)]


def test_a_step_that_cannot_be_written_breaks_its_job_and_leaves_no_gap(
    store: JobStore, feeder: JobFeeder
) -> None:
    job, other = claim(store, feeder), claim(store, feeder)
    disk = FullDisk(feeder)
    feeder.write(job.id, lambda s: record(s, job.id, 1))
    wait_until(lambda: feeder.has_news)
    [(job_id, failure)] = feeder.take_broken()
    assert (job_id, failure.code) == (job.id, "store_failed")
    assert "full" in failure.message
    disk.is_full = False
    feeder.write(job.id, lambda s: record(s, job.id, 2))
    feeder.write(other.id, lambda s: record(s, other.id, 1))
    wait_until(lambda: steps(store, other.id) == [1])
    assert steps(store, job.id) == []


def test_the_end_of_a_job_is_written_when_the_disk_has_room_again(
    store: JobStore,
    feeder: JobFeeder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeder_module, "TAKE_OVER_INTERVAL", 0.0)  # not of its own
    job = claim(store, feeder)
    disk = FullDisk(feeder)
    feeder.failed(job.id, JobFailure("server_error", "x" * 20_000))

    def complaints() -> int:
        return sum("cannot write the end" in record.getMessage() for record in caplog.records)

    wait_until(lambda: complaints() > 0)
    time.sleep(3 * POLL_INTERVAL)
    assert store.get_job(job.id).status is JobStatus.RUNNING
    assert complaints() == 1
    disk.is_full = False
    wait_until(lambda: store.get_job(job.id).status is JobStatus.FAILED)
    # Its place is free.
    for _ in range(2):
        claim(store, feeder)


def test_a_job_without_its_data_fails_and_the_next_one_is_claimed(
    store: JobStore, feeder: JobFeeder
) -> None:
    job = submit(store, with_data=False)
    claim(store, feeder)
    wait_until(lambda: store.get_job(job.id).status is JobStatus.FAILED)
    error = store.get_job(job.id).error
    assert error is not None
    assert error.code == "dataset_unreadable"


CLAIM_AND_SLEEP = """
import pathlib, sys, time
from flexllm_vllm.jobs import JobStore
store = JobStore(pathlib.Path(sys.argv[1]))
print(store.claim_next_job().id, flush=True)
time.sleep(60)
"""


def test_a_job_of_an_engine_that_was_killed_is_taken_over(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder_module, "TAKE_OVER_INTERVAL", 0.0)
    job = submit(store)
    engine = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_SLEEP, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert engine.stdout is not None
    feeder = None
    try:
        assert engine.stdout.readline().strip() == job.id
        feeder = JobFeeder(tmp_path, 2, ["demo"], lambda: None)
        own = claim(store, feeder)
        time.sleep(5 * POLL_INTERVAL)
        assert feeder.take_jobs() == []
        engine.kill()
        wait_until(lambda: feeder.has_news)
        assert [claimed.job.id for claimed in feeder.take_jobs()] == [job.id]
        assert store.get_job(own.id).status is JobStatus.RUNNING
    finally:
        engine.kill()
        engine.wait()
        engine.stdout.close()
        if feeder is not None:
            feeder.stop()
