import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flexllm_vllm.jobs import FinetuningJob, JobStateError, JobStatus, JobStore

AddJob = Callable[..., FinetuningJob]


def messages(store: JobStore, job_id: str) -> list[str]:
    return [event.message for event in store.list_events(job_id, limit=100)[0]]


def test_the_oldest_job_is_claimed_once(store: JobStore, add_job: AddJob) -> None:
    jobs = [add_job(), add_job()]
    claimed = store.claim_next_job()
    assert claimed is not None
    assert (claimed.id, claimed.status, claimed.attempts) == (jobs[0].id, JobStatus.RUNNING, 1)
    assert claimed.started_at is not None
    assert claimed == store.get_job(claimed.id)
    assert store.claim_next_job().id == jobs[1].id
    assert store.claim_next_job() is None


def test_a_job_for_another_model_waits(store: JobStore, add_job: AddJob) -> None:
    add_job(model="other")
    assert store.claim_next_job(models=["demo"]) is None
    assert store.claim_next_job(models=["demo", "other"]) is not None


def test_progress_and_metrics_are_recorded(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    with pytest.raises(JobStateError, match="queued"):
        store.record_progress(job.id, 1, 30, 100)
    store.claim_next_job()
    store.record_progress(job.id, 2, 30, 100)
    store.record_step(job.id, 2, {"train_loss": 1.25, "grad_norm": float("nan")})
    job = store.get_job(job.id)
    assert (job.step, job.total_steps, job.trained_tokens) == (2, 30, 100)
    event = store.list_events(job.id)[0][0]
    assert (event.type, event.message) == ("metrics", "Step 2/30: training loss=1.2500")
    assert event.data == {"step": 2, "total_steps": 30, "train_loss": 1.25, "grad_norm": None}


def test_success_serves_the_adapter(store: JobStore, add_job: AddJob) -> None:
    add_job()
    job = store.claim_next_job()
    assert job is not None
    before = store.adapters_version()
    assert store.adapters.get(job.adapter_name) is None
    store.succeed(job.id, job.adapter_path)
    done = store.get_job(job.id)
    assert (done.status, done.fine_tuned_model) == (JobStatus.SUCCEEDED, job.adapter_name)
    assert done.finished_at is not None
    adapter = store.adapters.get(job.adapter_name)
    assert adapter is not None
    assert (adapter.int_id, adapter.base_model) == (500_000_000, "demo")
    assert adapter.path == str(job.folder / "adapter")
    assert store.adapters.all() == [adapter]
    assert store.adapters_version() != before
    with pytest.raises(JobStateError):
        store.fail(job.id, "late", "too late")


def test_a_failed_job_says_why(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    store.fail(job.id, "out_of_memory", "It did not fit", "training_file")
    failed = store.get_job(job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("out_of_memory", "training_file")
    assert messages(store, job.id)[0] == "It did not fit"


def test_interrupted_jobs_are_tried_three_times(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    store.record_progress(job.id, 5, 30, 100)
    for attempt in (1, 2):
        with JobStore(store.root) as restarted:
            restarted.requeue_interrupted()
        assert store.claim_next_job().attempts == attempt
        store.record_progress(job.id, 5, 30, 100)  # no further than before
        with JobStore(store.root) as restarted:
            assert restarted.requeue_interrupted() == [job.id]
        queued = store.get_job(job.id)
        assert (queued.status, queued.step) == (JobStatus.QUEUED, 5)
        assert "continues from its last checkpoint" in messages(store, job.id)[0]
    store.claim_next_job()
    assert store.requeue_interrupted() == []
    failed = store.get_job(job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert failed.error.code == "server_interrupted"


def test_an_interrupted_job_is_cancelled_if_that_was_asked(
    store: JobStore, add_job: AddJob
) -> None:
    job = add_job()
    store.claim_next_job()
    store.request_cancel(job.id)
    assert store.requeue_interrupted() == []
    assert store.get_job(job.id).status is JobStatus.CANCELLED


CLAIM_AND_SLEEP = """
import sys, time
from pathlib import Path
from flexllm_vllm.jobs import JobStore
store = JobStore(Path(sys.argv[1]))
print(store.claim_next_job().id, flush=True)
time.sleep(60)
"""


def test_a_job_of_a_living_engine_is_left_alone(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    engine = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_SLEEP, str(store.root)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert engine.stdout is not None
    try:
        assert engine.stdout.readline().strip() == job.id
        assert store.requeue_interrupted() == []
        assert store.get_job(job.id).status is JobStatus.RUNNING
    finally:
        engine.kill()  # as a crash does: nothing is told to the store
        engine.wait()
        engine.stdout.close()
    assert store.requeue_interrupted() == [job.id]


def _claim_all(root: Path, start: float, claimed: "multiprocessing.Queue[list[str]]") -> None:
    with JobStore(root) as store:
        time.sleep(max(0.0, start - time.time()))
        ids = []
        while (job := store.claim_next_job()) is not None:
            ids.append(job.id)
        claimed.put(ids)


def test_two_processes_never_claim_the_same_job(store: JobStore, add_job: AddJob) -> None:
    jobs = {add_job().id for _ in range(40)}
    context = multiprocessing.get_context("spawn")
    claimed = context.Queue()
    start = time.time() + 4.0
    engines = [
        context.Process(target=_claim_all, args=(store.root, start, claimed)) for _ in range(2)
    ]
    for engine in engines:
        engine.start()
    ids = claimed.get(timeout=60) + claimed.get(timeout=60)
    for engine in engines:
        engine.join(timeout=60)
    assert len(ids) == 40
    assert set(ids) == jobs
