import io
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from flexllm_vllm.jobs import (
    CursorNotFoundError,
    FileInUseError,
    FileNotStoredError,
    FinetuningJob,
    JobNotFoundError,
    JobStateError,
    JobStatus,
    JobStore,
    LoraSpec,
)

AddJob = Callable[..., FinetuningJob]


def test_only_the_owner_may_read_the_store(store: JobStore) -> None:
    for folder in (store.root, store.root / "files", store.root / "jobs", store.root / "engines"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.root / "store.db").stat().st_mode) == 0o600


def test_files_are_kept_listed_and_deleted(store: JobStore) -> None:
    files = [
        store.files.create(io.BytesIO(b"x" * size), f"{size}.jsonl", "fine-tune")
        for size in range(3)
    ]
    assert store.files.get(files[2].id) == files[2]
    assert store.files.path(files[2].id).read_bytes() == b"xx"
    assert store.files.page() == (files[::-1], False)
    assert store.files.page(limit=2, order="asc") == (files[:2], True)
    assert store.files.page(after=files[1].id, order="asc") == ([files[2]], False)
    assert store.files.page(purpose="batch") == ([], False)
    store.files.delete(files[2].id)
    with pytest.raises(FileNotStoredError):
        store.files.path(files[2].id)
    with pytest.raises(CursorNotFoundError):
        store.files.page(after=files[2].id)
    assert sorted(p.name for p in (store.root / "files").iterdir()) == sorted(
        file.id for file in files[:2]
    )


def test_a_refused_file_leaves_nothing(store: JobStore) -> None:
    def refuse(path: Path) -> None:
        assert path.read_bytes() == b"bad"
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        store.files.create(io.BytesIO(b"bad"), "bad.jsonl", "fine-tune", check=refuse)
    assert list((store.root / "files").iterdir()) == []
    assert store.files.page() == ([], False)


def test_a_file_stays_while_a_job_needs_it(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    with pytest.raises(FileInUseError) as caught:
        store.files.delete(job.training_file)
    assert caught.value.job_ids == [job.id]
    store.request_cancel(job.id)
    store.files.delete(job.training_file)
    assert store.get_job(job.id).training_file == job.training_file


def test_a_job_is_read_as_it_was_written(store: JobStore, add_job: AddJob) -> None:
    lora = LoraSpec(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
    job = add_job(lora=lora, metadata={"a": "b"})
    assert store.get_job(job.id) == job
    assert job.lora == lora
    assert job.status is JobStatus.QUEUED
    assert job.fine_tuned_model is None
    assert job.folder.is_dir()
    assert job.adapter_int_id == 1_000_000
    assert add_job().adapter_int_id == 1_000_001
    with pytest.raises(JobNotFoundError):
        store.get_job("ftjob-none")


def test_a_job_needs_its_file(store: JobStore, add_job: AddJob) -> None:
    with pytest.raises(FileNotStoredError):
        add_job(training_file="file-gone")
    assert store.list_jobs() == ([], False)


def test_jobs_and_events_are_listed_newest_first(store: JobStore, add_job: AddJob) -> None:
    jobs = [add_job() for _ in range(3)]
    assert store.list_jobs(limit=2) == ([jobs[2], jobs[1]], True)
    assert store.list_jobs(after=jobs[1].id) == ([jobs[0]], False)
    for i in range(3):
        store.add_event(jobs[0].id, "info", f"event {i}", data={"i": i})
    newest, more = store.list_events(jobs[0].id, limit=2)
    assert ([event.message for event in newest], more) == (["event 2", "event 1"], True)
    oldest, more = store.list_events(jobs[0].id, after=newest[-1].id)
    assert ([event.message for event in oldest], more) == (["event 0"], False)
    with pytest.raises(CursorNotFoundError):
        store.list_events(jobs[1].id, after=newest[0].id)
    with pytest.raises(JobNotFoundError):
        store.list_events("ftjob-none")


def test_cancelling_depends_on_the_state(store: JobStore, add_job: AddJob) -> None:
    queued, running = add_job(), add_job()
    assert store.request_cancel(queued.id).status is JobStatus.CANCELLED
    assert store.claim_next_job().id == running.id
    assert store.request_cancel(running.id).status is JobStatus.RUNNING
    assert store.cancel_requested_jobs() == {running.id}
    store.cancelled(running.id)
    assert store.get_job(running.id).status is JobStatus.CANCELLED
    assert store.cancel_requested_jobs() == set()
    with pytest.raises(JobStateError, match="cancelled"):
        store.request_cancel(running.id)


def test_changes_by_other_processes_are_seen_cheaply(store: JobStore, add_job: AddJob) -> None:
    before = store.data_version()
    assert store.data_version() == before
    with JobStore(store.root) as other:
        other.files.create(io.BytesIO(b""), "x", "fine-tune")
    assert (after := store.data_version()) != before
    add_job()  # our own change, through another connection
    assert store.data_version() != after
