"""Results on the standard output, everything else on the standard error."""

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from openai import BaseModel
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
        """Rows under headers; no value is cut off."""
        self._grid([list(headers), *([_cell(value) for value in row] for row in rows)], "bold", "")

    def fields(self, rows: Sequence[tuple[str, Any]]) -> None:
        """Names and values, one pair a line; None is left out."""
        self._grid([[name, _cell(value)] for name, value in rows if value is not None], "", "bold")

    def _grid(self, rows: list[list[str]], first_row: str, first_column: str) -> None:
        """Columns of text, the first row and the first column in a style."""
        if not self.is_terminal:
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                self._write("  ".join(cells).rstrip())
            return
        grid = Table.grid(padding=(0, 2))
        for index in range(len(rows[0])):
            grid.add_column(overflow="fold", style=first_column if index == 0 else "")
        for index, row in enumerate(rows):
            grid.add_row(*map(Text, row), style=first_row if index == 0 else "")
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


def _cell(value: Any) -> str:
    return "" if value is None else printable(str(value))
