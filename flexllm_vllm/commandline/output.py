"""Results on the standard output, everything else on the standard error."""

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from openai import BaseModel
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Output:
    """How a command shows its results.

    Attributes:
        as_json: results are JSON.
        console: the standard output.
        messages: the standard error.
        is_terminal: whether the standard output is one, whatever colors are asked for.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(file=sys.stdout)
        self.messages = Console(file=sys.stderr)
        self.is_terminal = sys.stdout.isatty()

    def document(self, value: Any) -> None:
        """One JSON document."""
        self._write(json.dumps(plain_data(value), indent=2))

    def json_line(self, value: Any) -> None:
        """One line of JSON lines."""
        self._write(json.dumps(plain_data(value)))

    def text(self, text: str) -> None:
        """A line of the result."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str, style: str = "") -> None:
        """A line beside the result."""
        self.messages.print(
            printable(text), style=style, markup=False, highlight=False, soft_wrap=True
        )

    def note_more(self, more: bool) -> None:
        """Say that a list goes on."""
        if more:
            self.note("There are more: see --limit and --all", style="dim")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows under headers. A line that is too long for the terminal is broken by it alone, so
        that names can be copied."""
        header, *lines = _columns([headers, *rows])
        self.console.print(Text(header, style="bold"), soft_wrap=True)
        for line in lines:
            self.text(line)

    def fields(self, rows: Sequence[tuple[str, Any]]) -> None:
        """Names and values, one pair a line; None is left out."""
        rows = [(name, value) for name, value in rows if value is not None]
        if not self.is_terminal:
            for line in _columns(rows):
                self.text(line)
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(name, Text(_cell(value)))
        self.console.print(grid)

    def _write(self, text: str) -> None:
        print(text, file=self.console.file, flush=True)


def printable(text: str) -> str:
    """Text of others, without what would command the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def local_time(unix: int | None) -> str | None:
    """Date and time of day, here."""
    return None if unix is None else f"{datetime.fromtimestamp(unix):%Y-%m-%d %H:%M:%S}"


def plain_data(value: Any) -> Any:
    """The fields of an answer as the server sent them."""
    if isinstance(value, BaseModel):
        return value.to_dict(mode="json")
    if isinstance(value, dict):
        return {name: plain_data(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    return value


def _columns(rows: Sequence[Sequence[Any]]) -> list[str]:
    """A line for each row, its cells below one another."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]


def _cell(value: Any) -> str:
    return "" if value is None else printable(str(value))
