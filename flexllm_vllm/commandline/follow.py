"""Stay with a job until it ends."""

import time

import openai
import typer
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from flexllm_vllm.commandline.errors import CommandError, ExitCode
from flexllm_vllm.commandline.output import Output
from flexllm_vllm.commandline.patience import Patience
from flexllm_vllm.commandline.progress import ENDED
from flexllm_vllm.commandline.session import Session
from flexllm_vllm.commandline.views import (
    PLAIN_INTERVAL,
    JobView,
    JsonView,
    LiveView,
    PlainView,
)

POLL_INTERVAL = 1.0  # seconds
REQUEST_TIMEOUT = 30.0  # seconds; longer than that, the server counts as away
PATIENCE = 300.0  # seconds that the server may be away


class EventFeed:
    """The events of a job, each once."""

    def __init__(self, client: openai.OpenAI, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._last: str | None = None

    def poll(self) -> list[FineTuningJobEvent]:
        """The events since the last call, in the order of time."""
        fresh: list[FineTuningJobEvent] = []
        for event in self._client.fine_tuning.jobs.list_events(self._job_id, limit=100):
            if event.id == self._last:
                break
            fresh.append(event)
        if fresh:
            self._last = fresh[0].id  # the list is newest first
        return fresh[::-1]


def follow_progress(session: Session, job: FineTuningJob) -> None:
    """Show the progress of a job, as known now and until it ends; exit with what it came to."""
    output = session.output
    view: JobView
    if output.as_json:
        view = JsonView(output, jobs=True)
    elif output.is_terminal and output.console.is_interactive:
        view = LiveView(output)
    else:
        view = PlainView(output, PLAIN_INTERVAL)
    if job.status not in ENDED:
        view.update(job, [])
    _follow(session, job.id, view, f"jobs show {job.id} --follow")


def follow_events(session: Session, job_id: str) -> None:
    """Write every event of a job until it ends; then exit with what it came to."""
    output = session.output
    view = JsonView(output, jobs=False) if output.as_json else PlainView(output)
    _follow(session, job_id, view, f"jobs events {job_id} --follow")


def _follow(session: Session, job_id: str, view: JobView, command: str) -> None:
    client = session.client.with_options(timeout=REQUEST_TIMEOUT)
    feed = EventFeed(client, job_id)
    patience = Patience(session.base_url, view.notice, PATIENCE)
    come_back = f"Come back with: {session.come_back(command)}"
    try:
        with view:
            while True:
                # First the job: events that are read after its end are complete.
                job = patience.call(lambda: client.fine_tuning.jobs.retrieve(job_id))
                view.update(job, patience.call(feed.poll))
                if job.status in ENDED:
                    break
                time.sleep(POLL_INTERVAL)
    except KeyboardInterrupt:
        session.output.note(f"The job {job_id} goes on. {come_back}")
        session.output.note(f"Stop it with: {session.come_back(f'jobs cancel {job_id}')}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except CommandError as error:
        if error.exit_code is ExitCode.UNREACHABLE:
            session.output.note(f"The job {job_id} is not lost. {come_back}")
        raise
    _exit_with(session.output, job)


def _exit_with(output: Output, job: FineTuningJob) -> None:
    """End the process as the job has ended."""
    match job.status:
        case "succeeded":
            if not output.as_json:
                output.text(f"The model is served as {job.fine_tuned_model}")
        case "failed":
            reason = job.error.message if job.error else "no reason was given"
            output.note(f"The job {job.id} failed: {reason}", style="red")
            raise typer.Exit(ExitCode.JOB_FAILED)
        case _:
            output.note(f"The job {job.id} was cancelled", style="yellow")
            raise typer.Exit(ExitCode.JOB_CANCELLED)
