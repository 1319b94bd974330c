"""What can be wrong with training data."""


class DataError(ValueError):
    """A training file that cannot be used, with the place where it is wrong.

    Attributes:
        line: line of the file, counted from 1; None where the file as a whole is meant.
        field: path inside the line's JSON object (``messages[2].content``), or None.
        reason: what was got and what was expected.
    """

    def __init__(self, line: int | None, field: str | None, reason: str) -> None:
        self.line = line
        self.field = field
        self.reason = reason
        place = [f"line {line}"] if line is not None else []
        if field is not None:
            place.append(f"field '{field}'")
        super().__init__(f"{', '.join(place)}: {reason}" if place else reason)


class UnsupportedTokenizerError(ValueError):
    """The served model's tokenizer cannot tell which characters a token covers."""
