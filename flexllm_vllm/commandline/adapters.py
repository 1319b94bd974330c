"""``flexllm adapters``."""

from typing import Annotated

import typer

from flexllm_vllm.commandline.arguments import Directory, Force
from flexllm_vllm.commandline.exporting import export_adapter
from flexllm_vllm.commandline.output import local_time
from flexllm_vllm.commandline.pages import list_object
from flexllm_vllm.commandline.session import Session, server_command

app = typer.Typer(no_args_is_help=True, help="Trained adapters that the server serves.")

_PREFIX = "ft:"

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of an adapter, ft:...")]


@server_command(app, "list")
def list_adapters(session: Session) -> None:
    """List the adapters that can be named as a model."""
    models = [model for model in session.client.models.list() if model.id.startswith(_PREFIX)]
    if session.output.as_json:
        session.output.document(list_object(models, has_more=False))
        return
    rows = [
        (model.id, getattr(model, "parent", None), local_time(model.created)) for model in models
    ]
    session.output.table(("NAME", "BASE MODEL", "CREATED"), rows)


@server_command(app, "delete")
def delete(session: Session, name: Name) -> None:
    """Delete an adapter; it is no longer served."""
    deleted = session.client.models.delete(name)
    if session.output.as_json:
        session.output.document(deleted)
    else:
        session.output.text(f"{deleted.id} deleted")


@server_command(app, "export")
def export(session: Session, name: Name, directory: Directory, force: Force = False) -> None:
    """Write an adapter's PEFT folder to DIR."""
    export_adapter(session, name, directory, force)
