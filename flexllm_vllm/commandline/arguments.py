"""Arguments and options that several commands have, and how their text is read."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, ftjob-...")]
Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder for the adapter; created if missing.")
]
Force = Annotated[bool, typer.Option("--force", help="Write into DIR although it is not empty.")]
Limit = Annotated[int, typer.Option(min=1, help="How many are listed.")]
All = Annotated[bool, typer.Option("--all", help="List all of them.")]


def auto_or_int(text: str) -> int | str:
    """``auto`` or a number of the command line."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'auto'") from None


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """``name=value``, several times.

    Raises:
        typer.BadParameter: another form, or a name that is given twice.
    """
    values: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not name=value", param_hint=option)
        if name in values:
            raise typer.BadParameter(f"{name} is given twice", param_hint=option)
        values[name] = value
    return values


def json_or_text(text: str) -> Any:
    """A value as JSON (``0.1``, ``true``, ``["q_proj"]``), or else the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text
