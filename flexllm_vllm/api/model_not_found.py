"""vLLM's answer to a model that it does not know, in OpenAI's form."""

import json
from typing import Any

from starlette.types import Message, Send

# More than this is not an error of vLLM's.
_MAX_BYTES = 64 * 1024


def in_openais_form(send: Send) -> Send:
    """A ``send`` that rewrites vLLM's 404 for an unknown model: its code is ``model_not_found`` at
    OpenAI and the number 404 at vLLM. Everything else passes as it comes."""
    start: Message | None = None
    body = b""

    async def rewrite(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start" and message["status"] == 404:
            start = message
            return
        if start is None or message["type"] != "http.response.body":
            await send(message)
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if more and len(body) <= _MAX_BYTES:
            return
        rewritten = None if more else _rewritten(body)
        if rewritten is not None:
            body = rewritten
            start = {**start, "headers": _with_length(start["headers"], len(body))}
        await send(start)
        start = None
        await send({"type": "http.response.body", "body": body, "more_body": more})

    return rewrite


def _rewritten(body: bytes) -> bytes | None:
    try:
        error: Any = json.loads(body)["error"]
        message = error["message"]
        if error["code"] != 404 or not message.startswith("The model `"):
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    shown = {
        "message": message,
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    return json.dumps({"error": shown}, ensure_ascii=False, separators=(",", ":")).encode()


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]
