"""``flexllm jobs``, but for ``create``."""

from typing import Annotated, Any

import typer
from openai.types.fine_tuning import FineTuningJob
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from flexllm_vllm.commandline.arguments import All, Directory, Force, Job, Limit, pairs
from flexllm_vllm.commandline.errors import CommandError
from flexllm_vllm.commandline.exporting import export_adapter
from flexllm_vllm.commandline.follow import follow_events, follow_progress
from flexllm_vllm.commandline.output import local_time, plain_data
from flexllm_vllm.commandline.pages import collect, list_object
from flexllm_vllm.commandline.session import Session, server_command
from flexllm_vllm.commandline.views import event_line

app = typer.Typer(no_args_is_help=True, help="Finetuning jobs.")

OfMetadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="Jobs that have this pair."),
]
Follow = Annotated[
    bool, typer.Option("--follow", help="Stay until the job ends, and exit as it does.")
]


@server_command(app, "list")
def list_jobs(
    session: Session, metadata: OfMetadata = None, limit: Limit = 20, all: All = False
) -> None:
    """List jobs, newest first."""
    filters: dict[str, Any] = {"metadata": pairs(metadata, "--metadata")} if metadata else {}
    jobs, more = collect(
        lambda limit: session.client.fine_tuning.jobs.list(limit=limit, **filters),
        None if all else limit,
    )
    if session.output.as_json:
        session.output.document(list_object(jobs, more))
        return
    rows = [
        (job.id, job.status, job.fine_tuned_model or job.model, local_time(job.created_at))
        for job in jobs
    ]
    session.output.table(("ID", "STATUS", "MODEL", "CREATED"), rows)
    session.output.note_more(more)


@server_command(app, "show")
def show(session: Session, job_id: Job, follow: Follow = False) -> None:
    """Show one job; with --follow its progress, until it ends."""
    job = session.client.fine_tuning.jobs.retrieve(job_id)
    if follow:
        follow_progress(session, job)
    else:
        show_job(session, job)


@server_command(app, "events")
def events(
    session: Session, job_id: Job, follow: Follow = False, limit: Limit = 20, all: All = False
) -> None:
    """Show the last events of a job, the newest at the end; with --follow all of them, and those
    to come."""
    if follow:
        # A wrong address or id is told at once; only later a server that is away is waited for.
        follow_events(session, session.client.fine_tuning.jobs.retrieve(job_id).id)
        return
    found, more = collect(
        lambda limit: session.client.fine_tuning.jobs.list_events(job_id, limit=limit),
        None if all else limit,
    )
    found.reverse()
    if session.output.as_json:
        session.output.document(list_object(found, more))
        return
    for event in found:
        session.output.text(event_line(event))
    session.output.note_more(more)


@server_command(app, "cancel")
def cancel(session: Session, job_id: Job) -> None:
    """Cancel a job: a running one at its next step."""
    job = session.client.fine_tuning.jobs.cancel(job_id)
    _show_change(session, job, "cancelled")


@server_command(app, "pause")
def pause(session: Session, job_id: Job) -> None:
    """Pause a job: a running one after its current step."""
    job = session.client.fine_tuning.jobs.pause(job_id)
    _show_change(session, job, "paused")


@server_command(app, "resume")
def resume(session: Session, job_id: Job) -> None:
    """Let a paused job go on."""
    job = session.client.fine_tuning.jobs.resume(job_id)
    _show_change(session, job, job.status)


@server_command(app, "checkpoints")
def checkpoints(session: Session, job_id: Job, limit: Limit = 20, all: All = False) -> None:
    """List the checkpoints of a job that can be named as a model, newest first."""
    found, more = collect(
        lambda limit: session.client.fine_tuning.jobs.checkpoints.list(job_id, limit=limit),
        None if all else limit,
    )
    if session.output.as_json:
        session.output.document(list_object(found, more))
        return
    headers = ("STEP", "MODEL", "TRAIN LOSS", "VALID LOSS", "CREATED")
    session.output.table(headers, [_checkpoint_row(checkpoint) for checkpoint in found])
    session.output.note_more(more)


@server_command(app, "export")
def export(session: Session, job_id: Job, directory: Directory, force: Force = False) -> None:
    """Write the adapter of a job that has succeeded to DIR, as a PEFT folder."""
    job = session.client.fine_tuning.jobs.retrieve(job_id)
    if job.fine_tuned_model is None:
        raise CommandError(f"The job {job.id} has no adapter: it is {job.status}")
    export_adapter(session, job.fine_tuned_model, directory, force)


def show_job(session: Session, job: FineTuningJob) -> None:
    """All that is known of a job."""
    if session.output.as_json:
        session.output.document(job)
        return
    method: dict[str, Any] = plain_data(job.method) if job.method else {"type": "supervised"}
    settings = method.get(method["type"]) or {}
    error = None
    if job.error is not None and job.error.message:
        error = f"{job.error.message} ({job.error.code})"
    session.output.fields(
        [
            ("id", job.id),
            ("status", job.status),
            ("error", error),
            ("model", job.model),
            ("fine-tuned model", job.fine_tuned_model),
            ("training file", job.training_file),
            ("validation file", job.validation_file),
            ("result files", _joined(job.result_files)),
            ("method", method["type"]),
            ("hyperparameters", _assignments(settings.get("hyperparameters"))),
            ("lora", _assignments(settings.get("lora"))),
            ("seed", job.seed),
            ("metadata", _assignments(job.metadata)),
            ("trained tokens", job.trained_tokens),
            ("created", local_time(job.created_at)),
            ("estimated finish", local_time(job.estimated_finish)),
            ("finished", local_time(job.finished_at)),
        ]
    )


def _show_change(session: Session, job: FineTuningJob, wanted: str) -> None:
    if session.output.as_json:
        session.output.document(job)
    elif job.status == wanted:
        session.output.text(f"{job.id} is {job.status}")
    else:
        session.output.text(f"{job.id} is {job.status}, and will be {wanted} at its next step")


def _checkpoint_row(checkpoint: FineTuningJobCheckpoint) -> tuple[object, ...]:
    metrics = checkpoint.metrics
    return (
        checkpoint.step_number,
        checkpoint.fine_tuned_model_checkpoint,
        _loss(metrics.train_loss),
        _loss(metrics.full_valid_loss if metrics.valid_loss is None else metrics.valid_loss),
        local_time(checkpoint.created_at),
    )


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _assignments(values: dict[str, Any] | None) -> str | None:
    """``name=value`` in words; what has no value is left out."""
    pairs = {name: value for name, value in (values or {}).items() if value is not None}
    return ", ".join(f"{name}={_value(value)}" for name, value in pairs.items()) or None


def _value(value: Any) -> str:
    return _joined(value, "+") or "" if isinstance(value, list) else str(value)


def _joined(values: list[Any], separator: str = ", ") -> str | None:
    return separator.join(str(value) for value in values) or None
