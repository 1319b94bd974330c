"""Forms in any pieces, whole and broken."""

import asyncio
import re
from typing import Any

from fastapi import Request
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flexllm_vllm.api import multipart
from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.api.multipart import Form, read_form

# What looks like the end of a part, or almost.
_tricky = st.sampled_from([b"\r\n--x", b"\r\n--", b"--x--", b"\r", b"\n", b"-", b"\r\n--xy", b"x"])
_content = st.lists(st.one_of(_tricky, st.binary(max_size=20)), max_size=12).map(b"".join)
_cuts = st.lists(st.integers(1, 30), max_size=30)
END = b"\r\n--x--\r\n"


def form(content: bytes, field: bytes = b"fine-tune") -> bytes:
    return (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + field + b"\r\n"
        b'--x\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name="file"; '
        b'filename="a.jsonl"\r\n\r\n' + content + END
    )


def read(body: bytes, cuts: list[int]) -> tuple[Form, bytes]:
    """Read a body that comes in pieces of these sizes, the rest in one."""
    pieces = []
    for size in cuts:
        pieces.append(body[:size])
        body = body[size:]
    pieces.append(body)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    written = bytearray()
    read = asyncio.run(read_form(request, "file", ("purpose",), written.extend))
    return read, bytes(written)


def ends_within(content: bytes) -> bool:
    """Whether what follows a part's headers ends before this content does."""
    found = re.search(rb"\r\n--x(\r\n|--|[ \t])", content + END)
    return found is None or found.start() != len(content)


@given(content=_content, cuts=_cuts)
@example(content=b"\r\n--", cuts=[1] * 300)
@settings(deadline=None, max_examples=150)
def test_any_pieces_make_the_same_form(content: bytes, cuts: list[int]) -> None:
    assume(not ends_within(content))
    batch, multipart._BATCH_BYTES = multipart._BATCH_BYTES, 7
    try:
        found, written = read(form(content), cuts)
    finally:
        multipart._BATCH_BYTES = batch
    assert found == Form("a.jsonl", {"purpose": "fine-tune"})
    assert written == content


@given(body=_content, begin=st.integers(0, 200), end=st.integers(0, 200), cuts=_cuts)
@settings(deadline=None, max_examples=300)
def test_a_broken_form_is_refused_and_nothing_else(
    body: bytes, begin: int, end: int, cuts: list[int]
) -> None:
    whole = form(b"content")
    status = 200
    try:
        read(whole[:begin] + body + whole[end:], cuts)
    except ApiError as error:
        status = error.status
    assert status in (200, 400)
