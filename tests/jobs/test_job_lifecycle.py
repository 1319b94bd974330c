"""Pausing, checkpoints, and runs that repeat what an interrupted one had done."""

from collections.abc import Callable

import pytest

from flexllm_vllm.jobs import FinetuningJob, JobNotFoundError, JobStateError, JobStatus, JobStore

AddJob = Callable[..., FinetuningJob]


def messages(store: JobStore, job_id: str) -> list[str]:
    return [event.message for event in store.list_events(job_id, limit=100)[0]]


def test_a_queued_job_is_paused_at_once_and_not_claimed(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    assert store.request_pause(job.id).status is JobStatus.PAUSED
    assert store.claim_next_job() is None
    assert store.request_pause(job.id).status is JobStatus.PAUSED
    assert store.resume(job.id).status is JobStatus.QUEUED
    claimed = store.claim_next_job()
    assert claimed is not None
    assert claimed.id == job.id


def test_a_running_job_is_paused_by_its_engine(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    assert store.pause_requested_jobs() == set()
    assert store.request_pause(job.id).status is JobStatus.RUNNING
    assert store.pause_requested_jobs() == {job.id}
    store.paused(job.id, 3)
    paused = store.get_job(job.id)
    assert (paused.status, paused.pause_requested) == (JobStatus.PAUSED, False)
    assert messages(store, job.id)[0] == "Fine-tuning job paused at step 3"
    assert store.request_cancel(job.id).status is JobStatus.CANCELLED
    with pytest.raises(JobStateError, match="resumed"):
        store.resume(job.id)


def test_a_pause_can_be_taken_back(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    store.request_pause(job.id)
    assert store.resume(job.id).pause_requested is False
    assert store.pause_requested_jobs() == set()
    store.request_cancel(job.id)
    with pytest.raises(JobStateError, match="cancelling"):
        store.request_pause(job.id)


def test_a_pause_that_a_crash_overtook_is_kept(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    store.request_pause(job.id)
    with JobStore(store.root) as restarted:
        assert restarted.requeue_interrupted() == []
    assert store.get_job(job.id).status is JobStatus.PAUSED


def test_repeated_steps_are_recorded_once(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    for step in (1, 2, 3, 2, 3, 4):
        store.record_progress(job.id, step, 10, step * 100)
        store.record_step(job.id, step, {"train_loss": float(step)})
    store.record_evaluation(job.id, 4, {"valid_loss": float("nan")})
    store.record_evaluation(job.id, 4, {"valid_loss": 1.0})
    events, _ = store.list_events(job.id, limit=100)
    metrics = [e.data for e in events[::-1] if e.type == "metrics" and e.data]
    assert [data["step"] for data in metrics] == [1, 2, 3, 4, 4]
    assert metrics[-1] == {"step": 4, "total_steps": 10, "valid_loss": None}
    running = store.get_job(job.id)
    assert (running.step, running.trained_tokens) == (4, 400)


def test_a_checkpoint_is_served_once_under_its_own_name(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    folder = job.checkpoints_path / "step-5"
    for _ in range(2):
        store.record_checkpoint(job.id, 5, folder, {"train_loss": 0.5})
    store.record_checkpoint(job.id, 9, job.checkpoints_path / "step-9", {})
    checkpoints, more = store.list_checkpoints(job.id)
    assert [c.step for c in checkpoints] == [9, 5]
    assert not more
    assert checkpoints[1].name == f"{job.adapter_name}:ckpt-step-5"
    assert store.list_checkpoints(job.id, after=checkpoints[0].id)[0] == [checkpoints[1]]
    adapter = store.adapters.get(checkpoints[1].name)
    assert adapter is not None
    assert (adapter.path, adapter.source, adapter.job_id) == (str(folder), "checkpoint", job.id)
    store.succeed(job.id, job.adapter_path)
    ids = [a.int_id for a in store.adapters.all()]
    assert len(set(ids)) == 3
    assert job.adapter_int_id not in ids


def test_ids_of_deleted_adapters_are_not_given_again(store: JobStore, add_job: AddJob) -> None:
    job = add_job()
    store.claim_next_job()
    folder = job.checkpoints_path
    store.record_checkpoint(job.id, 1, folder / "step-1", {})
    store.record_checkpoint(job.id, 2, folder / "step-2", {})
    before = store.adapters_version()
    used = {a.int_id for a in store.adapters.all()}
    store.forget_checkpoint(job.id, 2)
    assert store.checkpoint_steps(job.id) == [1]
    assert store.adapters_version() != before
    store.record_checkpoint(job.id, 3, folder / "step-3", {})
    newest = store.adapters.all()[-1]
    assert newest.int_id not in used


def test_a_tenant_sees_its_own_jobs(store: JobStore, add_job: AddJob) -> None:
    ours, theirs = add_job(organization_id="org-a"), add_job(organization_id="org-b")
    assert [job.id for job in store.list_jobs(organization_id="org-a")[0]] == [ours.id]
    for look in (
        store.get_job,
        store.request_cancel,
        store.request_pause,
        store.resume,
    ):
        with pytest.raises(JobNotFoundError):
            look(theirs.id, "org-a")
    with pytest.raises(JobNotFoundError):
        store.list_events(theirs.id, organization_id="org-a")
    with pytest.raises(JobNotFoundError):
        store.list_checkpoints(theirs.id, organization_id="org-a")


def test_jobs_are_found_by_their_metadata(store: JobStore, add_job: AddJob) -> None:
    none = add_job()
    blue = add_job(metadata={"team": "blue", 'it\'s "odd".': "x"})
    red = add_job(metadata={"team": "red"})

    def found(metadata: dict[str, str]) -> set[str]:
        return {job.id for job in store.list_jobs(metadata=metadata)[0]}

    assert found({"team": "blue"}) == {blue.id}
    assert found({"team": "blue", 'it\'s "odd".': "x"}) == {blue.id}
    assert found({"team": "blue", "x": "y"}) == set()
    assert found({"team": "red"}) == {red.id}
    assert found({}) == {none.id}
