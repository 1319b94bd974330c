"""What of a job's checkpoints the engine removes, and what it leaves to the API."""

import io
from pathlib import Path
from typing import Any

from flexllm_vllm import checkpoints
from flexllm_vllm.jobs import FinetuningJob, JobStore, LoraSpec, NewJob, TrainingSpec
from flexllm_vllm.scheduler.job_files import add_checkpoint, keep_last, prune, resume_point
from flexllm_vllm.scheduler.training_loop import Save


def write(folder: Path, step: int, **state: Any) -> Path:
    path = checkpoints.folder_of(folder, step)
    path.mkdir(parents=True)
    for name in (*checkpoints.ADAPTER_FILES, checkpoints.OPTIMIZER_FILE):
        (path / name).write_text("{}")
    checkpoints.write_state(path, {"step": step, **state})
    return path


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_a_checkpoint_that_is_served_no_more_keeps_its_adapter(tmp_path: Path) -> None:
    """A request that has named it may be loading it; one that was never served goes whole."""
    with JobStore(tmp_path) as store:
        job = _claimed_job(store, save_total_limit=1)
        paths = {step: write(job.checkpoints_path, step) for step in (1, 2, 3, 4, 5)}
        for step in (1, 3, 5):
            store.record_checkpoint(job.id, step, paths[step], {})
        store.adapters.delete("ft:demo:local::x:ckpt-step-1")
        prune(store, job, best_step=0)
        assert store.checkpoint_steps(job.id) == [5]
        assert not paths[2].exists()
        assert names(paths[1]) == names(paths[3]) == set(checkpoints.ADAPTER_FILES)
        assert all(checkpoints.STATE_FILE in names(paths[step]) for step in (4, 5))


def test_a_checkpoint_deleted_while_its_job_is_paused_is_not_announced_on_resume(
    tmp_path: Path,
) -> None:
    """Its state stays, for the job to go on from. Its name does not come back."""
    with JobStore(tmp_path) as store:
        job = _claimed_job(store)
        for step in (2, 4):
            path = write(job.checkpoints_path, step, served_step=step, metrics={})
            store.record_checkpoint(job.id, step, path, {})
        store.request_pause(job.id)
        store.paused(job.id, 4)
        store.adapters.delete("ft:demo:local::x:ckpt-step-4")
        store.resume(job.id)
        assert store.claim_next_job() is not None
        before = _messages(store, job.id)
        with JobStore(tmp_path) as restarted:  # whatever process goes on with it
            found = resume_point(restarted, job)
        assert found is not None
        assert found.state["step"] == 4
        assert store.checkpoint_steps(job.id) == [2]
        assert store.adapters.get("ft:demo:local::x:ckpt-step-4") is None
        assert _messages(store, job.id) == ["Training continues at step 4", *before]
        # The API does not take from it what it goes on from.
        assert store.adapters.removable(2**40) == []
        # It comes to the step again, from an earlier checkpoint; then it fails.
        save = Save(path, 4, served=True, is_final=False, metrics={})
        path.rename(checkpoints.unfinished(path))
        add_checkpoint(store, job, save, best_step=0)
        keep_last(store, job.id)
        assert [c.step for c in store.list_checkpoints(job.id)[0]] == [2]


def _claimed_job(store: JobStore, **training: int) -> FinetuningJob:
    file = store.files.create(io.BytesIO(b"x"), "a", "fine-tune")
    job_id, _ = store.new_job()
    spec = TrainingSpec(batch_size=1, max_seq_length=8, seed=0, **training)
    store.create_job(NewJob(job_id, "demo", "ft:demo:local::x", file.id, LoraSpec(), spec, 9, {}))
    job = store.claim_next_job()
    assert job is not None
    return job


def _messages(store: JobStore, job_id: str) -> list[str]:
    return [event.message for event in store.list_events(job_id)[0]]
