"""A job's checkpoints and its result on disk, in step with the store. Called from the feeder's
thread, in the order in which things happened."""

import csv
import io
import shutil
from pathlib import Path
from typing import Any

from flexllm_vllm import checkpoints
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import FinetuningJob
from flexllm_vllm.log import get_logger
from flexllm_vllm.scheduler.training_loop import Save

logger = get_logger(__name__)

# Checkpoints to go on from: one, and the one before in case that it is damaged.
RESUMABLE = 2

RESULT_COLUMNS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
)


def add_checkpoint(store: JobStore, job: FinetuningJob, save: Save, best_step: int) -> None:
    """A checkpoint is written: gives it its name, serves it if it is to be, removes older ones.

    What happened up to its step is in the store by now: events are never lost between the two.
    """
    checkpoints.finish(save.path)
    if save.served:
        store.record_checkpoint(job.id, save.step, save.path, save.metrics)
    prune(store, job, best_step)


def prune(store: JobStore, job: FinetuningJob, best_step: int) -> None:
    """Forgets served checkpoints beyond ``save_total_limit``, and the state of all but the last."""
    served = store.checkpoint_steps(job.id)
    for step in [s for s in served if s != best_step][: -job.training.save_total_limit]:
        store.forget_checkpoint(job.id, step)
    folder = job.checkpoints_path
    keep = set(checkpoints.resumable_steps(folder)[-RESUMABLE:])
    checkpoints.strip(folder, keep, _adapter_steps(store, job))


def resume_point(store: JobStore, job: FinetuningJob) -> checkpoints.Checkpoint | None:
    """Where a job that was claimed goes on; None: at its beginning. Damaged ones are reported."""
    folder = job.checkpoints_path
    checkpoints.remove_unfinished(folder)
    found, problems = checkpoints.newest(folder)
    for problem in problems:
        store.add_event(job.id, "warn", f"A checkpoint is damaged and is not used: {problem}")
    for step in checkpoints.resumable_steps(folder):
        _serve_if_due(store, job, step)
    if found is not None:
        store.add_event(job.id, "info", f"Training continues at step {found.state['step']}")
    elif job.step:
        store.add_event(job.id, "warn", "No checkpoint is left: training begins again")
    return found


def _serve_if_due(store: JobStore, job: FinetuningJob, step: int) -> None:
    """A server that stopped may have written a checkpoint and not yet announced it."""
    try:
        found = checkpoints.read(checkpoints.folder_of(job.checkpoints_path, step))
    except checkpoints.CheckpointError:
        return
    if found.state["served_step"] == step:
        store.record_checkpoint(job.id, step, found.path, found.state["metrics"])


def complete(store: JobStore, job: FinetuningJob, result_step: int | None) -> None:
    """Ends a job whose training is over; ``result_step`` is the checkpoint that is its result.

    Raises:
        OSError: the adapter cannot be written.
    """
    if result_step is not None:
        _copy_adapter(checkpoints.folder_of(job.checkpoints_path, result_step), job.adapter_path)
    checkpoints.strip(job.checkpoints_path, set(), _adapter_steps(store, job))
    results = store.files.create(
        io.BytesIO(_results(store, job)),
        "step_metrics.csv",
        "fine-tune-results",
        organization_id=job.organization_id,
    )
    try:
        store.succeed(job.id, job.adapter_path, results.id)
    except Exception:
        store.files.delete(results.id)
        raise


def keep_last(store: JobStore, job_id: str) -> None:
    """A job has failed: its last checkpoint is served, so that it is not lost; nothing else."""
    try:
        job = store.get_job(job_id)
        found, _ = checkpoints.newest(job.checkpoints_path)
        if found is not None and found.state["step"]:
            store.record_checkpoint(job.id, found.state["step"], found.path, found.state["metrics"])
        clean_up(store, job)
    except Exception:
        logger.exception("cannot keep the last checkpoint of finetuning job %s", job_id)


def clean_up(store: JobStore, job: FinetuningJob) -> None:
    """Nothing will go on from the checkpoints of a job that has ended; those served are kept."""
    checkpoints.remove_unfinished(job.checkpoints_path)
    checkpoints.strip(job.checkpoints_path, set(), _adapter_steps(store, job))


def _adapter_steps(store: JobStore, job: FinetuningJob) -> set[int]:
    """Steps whose adapters requests may load: those that are served, and those that were until a
    moment ago. The API removes the folders of these (``api/adapter_removal.py``)."""
    folder = job.checkpoints_path
    deleted = store.adapters.deleted_folders(job.id)
    pending = {s for s in checkpoints.steps(folder) if checkpoints.folder_of(folder, s) in deleted}
    return pending | set(store.checkpoint_steps(job.id))


def _copy_adapter(source: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in checkpoints.ADAPTER_FILES:
        shutil.copyfile(source / name, temporary / name)
        checkpoints.sync(temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    checkpoints.sync(target.parent)


def _results(store: JobStore, job: FinetuningJob) -> bytes:
    """The metrics of every step as CSV, OpenAI's columns."""
    rows: dict[int, dict[str, Any]] = {}
    for event in store.metrics_events(job.id):
        rows.setdefault(event["step"], {}).update(event)
    text = io.StringIO()
    writer = csv.DictWriter(text, RESULT_COLUMNS, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue().encode()
