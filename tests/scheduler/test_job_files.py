"""What of a job's checkpoints the engine removes, and what it leaves to the API."""

import io
from pathlib import Path

from flexllm_vllm import checkpoints
from flexllm_vllm.jobs import JobStore, LoraSpec, NewJob, TrainingSpec
from flexllm_vllm.scheduler.job_files import prune


def write(folder: Path, step: int) -> Path:
    path = checkpoints.folder_of(folder, step)
    path.mkdir(parents=True)
    for name in (*checkpoints.ADAPTER_FILES, checkpoints.OPTIMIZER_FILE):
        (path / name).write_text("{}")
    checkpoints.write_state(path, {"step": step})
    return path


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_a_checkpoint_that_is_served_no_more_keeps_its_adapter(tmp_path: Path) -> None:
    """A request that has named it may be loading it; one that was never served goes whole."""
    with JobStore(tmp_path) as store:
        file = store.files.create(io.BytesIO(b"x"), "a", "fine-tune")
        job_id, _ = store.new_job()
        training = TrainingSpec(batch_size=1, max_seq_length=8, seed=0, save_total_limit=1)
        new = NewJob(job_id, "demo", "ft:demo:local::x", file.id, LoraSpec(), training, 9, {})
        store.create_job(new)
        job = store.claim_next_job()
        assert job is not None
        paths = {step: write(job.checkpoints_path, step) for step in (1, 2, 3, 4, 5)}
        for step in (1, 3, 5):
            store.record_checkpoint(job.id, step, paths[step], {})
        store.adapters.delete("ft:demo:local::x:ckpt-step-1")
        prune(store, job, best_step=0)
        assert store.checkpoint_steps(job.id) == [5]
        assert not paths[2].exists()
        assert names(paths[1]) == names(paths[3]) == set(checkpoints.ADAPTER_FILES)
        assert all(checkpoints.STATE_FILE in names(paths[step]) for step in (4, 5))
