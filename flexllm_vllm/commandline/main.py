"""The ``flexllm`` command: its groups, and what its process begins with."""

from typing import Annotated

import typer

from flexllm_vllm import __version__
from flexllm_vllm.commandline import adapters, create, files

app = typer.Typer(
    name="flexllm",
    no_args_is_help=True,
    # A traceback is for what nobody has thought of, and then without every local value (a key).
    pretty_exceptions_show_locals=False,
    epilog=(
        "Exit codes: 0 done, 1 refused by the server, 2 wrong usage, 3 the job failed, "
        "4 the job was cancelled, 5 the server is not reachable, 130 interrupted."
    ),
)
app.add_typer(create.app, name="jobs")
app.add_typer(files.app, name="files")
app.add_typer(adapters.app, name="adapters")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexllm {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
]


@app.callback()
def flexllm(version: Version = False) -> None:
    """Finetuning jobs, files and adapters of a vLLM server with --enable-finetuning."""


def main() -> None:
    """Entry point of the ``flexllm`` command."""
    app(prog_name="flexllm")
