"""Multipart forms, read from the body as it arrives: the file goes to disk, the fields are small.

Starlette's ``request.form()`` would spool the whole file into the temporary folder first.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from flexllm_vllm.api.errors import invalid

# What a form may hold beside its file, boundaries and headers included.
FORM_BYTES = 64 * 1024
_MAX_FIELD_BYTES = 4096
# Bytes that are parsed and written at a time, in a worker thread.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Form:
    """What came with a file."""

    filename: str
    fields: dict[str, str]


def announced_bytes(request: Request) -> int:
    """The least size of the file in a form, as far as the client says it; 0 where it does not."""
    return max(0, int(request.headers.get("content-length") or 0) - FORM_BYTES)


async def read_form(
    request: Request,
    file_field: str,
    names: Collection[str],
    write: Callable[[memoryview], None],
    check: Callable[[Mapping[str, str]], object] = len,
) -> Form:
    """Read a form of one file and the fields ``names``, any of which may be missing.

    Args:
        file_field: name of the field that is the file.
        write: takes the file's content piece by piece, in a worker thread. What it raises ends
            the reading.
        check: is shown the fields after each one, likewise: it may refuse a field that comes
            before the file without reading that.

    Raises:
        ApiError: the body is no such form.
    """
    boundary = _boundary(request)
    batch = bytearray()
    try:
        parser = _FormParser(boundary, file_field, names, write, check)
        async for chunk in request.stream():
            batch += chunk
            if len(batch) >= _BATCH_BYTES or not parser.is_within_file:
                await asyncio.to_thread(parser.feed, bytes(batch))
                batch.clear()
        await asyncio.to_thread(parser.feed, bytes(batch))
    except ClientDisconnect:
        raise invalid("The connection was closed before the end of the body") from None
    except FormParserError as error:
        raise invalid(f"We could not parse the multipart form of your request: {error}") from None
    return parser.form()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise invalid("The body must be a form of the type multipart/form-data, with its boundary")
    return options[b"boundary"]


class _FormParser:
    """Callbacks of the push parser, and what they have found so far."""

    def __init__(
        self,
        boundary: bytes,
        file_field: str,
        names: Collection[str],
        write: Callable[[memoryview], None],
        check: Callable[[Mapping[str, str]], object],
    ) -> None:
        self._check = check
        self._file_field = file_field
        self._names = names
        self._write = write
        self._filename: str | None = None
        self._fields: dict[str, str] = {}
        self._ended = False
        # Of the part that is being read: its headers, name and content.
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._is_file = False
        self._value = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    @property
    def is_within_file(self) -> bool:
        """Whether the part that is being read is the file."""
        return self._is_file

    def feed(self, data: bytes) -> None:
        """The next bytes of the body."""
        self._parser.write(data)

    def form(self) -> Form:
        """What was read.

        Raises:
            ApiError: something is missing.
        """
        if not self._ended:
            raise invalid("The multipart form of your request ends before its last boundary")
        if self._filename is None:
            message = f"Missing required parameter: you must upload a '{self._file_field}'"
            raise invalid(message, self._file_field, "missing_param")
        return Form(self._filename, self._fields)

    def _begin(self) -> None:
        self._headers = {}
        self._is_file = False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = name == self._file_field
        self._name = name
        self._value = bytearray()
        if name in self._fields or (self._is_file and self._filename is not None):
            raise invalid(f"'{name}' is given twice", name)
        if self._is_file:
            if b"filename" not in options:
                raise invalid(f"'{name}' must be a file, with a file name", name)
            self._filename = options[b"filename"].decode(errors="replace")
        elif name not in self._names:
            name = name[:80]
            message = f"Unrecognized request argument supplied: {name}"
            raise invalid(message, name, "unknown_param")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._write(memoryview(data)[start:end])
            return
        if len(self._value) + end - start > _MAX_FIELD_BYTES:
            message = f"'{self._name}' is longer than {_MAX_FIELD_BYTES} bytes"
            raise invalid(message, self._name)
        self._value += data[start:end]

    def _end(self) -> None:
        if not self._is_file:
            self._fields[self._name] = self._value.decode(errors="replace")
            self._check(self._fields)

    def _finish(self) -> None:
        self._ended = True
