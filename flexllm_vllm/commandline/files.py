"""``flexllm files``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from openai.types import FileObject

from flexllm_vllm.commandline.arguments import All, Limit
from flexllm_vllm.commandline.output import local_time
from flexllm_vllm.commandline.pages import collect, list_object
from flexllm_vllm.commandline.session import Session, server_command
from flexllm_vllm.commandline.uploads import upload as upload_file

app = typer.Typer(no_args_is_help=True, help="Training files on the server.")

_PAGE_SIZE = 10_000

FileId = Annotated[str, typer.Argument(metavar="FILE", help="Id of a file, file-...")]
PathArgument = Annotated[
    Path,
    typer.Argument(metavar="PATH", exists=True, dir_okay=False, help="A JSONL file."),
]
Purpose = Annotated[str, typer.Option(help="What the file is for.")]
OfPurpose = Annotated[str | None, typer.Option("--purpose", help="List files of this purpose.")]


@server_command(app, "upload")
def upload(session: Session, path: PathArgument, purpose: Purpose = "fine-tune") -> None:
    """Upload a file; the server checks every line."""
    file = upload_file(session, path, purpose)
    if session.output.as_json:
        session.output.document(file)
    else:
        session.output.text(file.id)


@server_command(app, "list")
def list_files(
    session: Session, purpose: OfPurpose = None, limit: Limit = 20, all: All = False
) -> None:
    """List files, newest first."""
    filters: dict[str, Any] = {} if purpose is None else {"purpose": purpose}
    files, more = collect(
        lambda limit: session.client.files.list(limit=limit, **filters),
        None if all else limit,
        _PAGE_SIZE,
    )
    if session.output.as_json:
        session.output.document(list_object(files, more))
        return
    headers = ("ID", "NAME", "BYTES", "PURPOSE", "STATUS", "CREATED")
    session.output.table(headers, [_row(file) for file in files])
    session.output.note_more(more)


@server_command(app, "show")
def show(session: Session, file_id: FileId) -> None:
    """Show one file."""
    file = session.client.files.retrieve(file_id)
    if session.output.as_json:
        session.output.document(file)
        return
    session.output.fields(
        [
            ("id", file.id),
            ("name", file.filename),
            ("bytes", file.bytes),
            ("purpose", file.purpose),
            ("status", file.status),
            ("status details", file.status_details),
            ("created", local_time(file.created_at)),
            ("expires", local_time(file.expires_at)),
        ]
    )


@server_command(app, "delete")
def delete(session: Session, file_id: FileId) -> None:
    """Delete a file that no unfinished job needs."""
    deleted = session.client.files.delete(file_id)
    if session.output.as_json:
        session.output.document(deleted)
    else:
        session.output.text(f"{deleted.id} deleted")


def _row(file: FileObject) -> tuple[object, ...]:
    created = local_time(file.created_at)
    return file.id, file.filename, file.bytes, file.purpose, file.status, created
