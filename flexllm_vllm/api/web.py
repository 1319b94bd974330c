"""``/finetuning``: the web page. A static shell that holds no data and asks for the key.

The page names its parts and ``/v1`` by relative addresses, so that it works below ``--root-path``
and behind a proxy that adds a prefix. It lies outside of ``/v1``, where a browser that has no key
yet can load it.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from flexllm_vllm.api.errors import ApiError, OpenAIRoute

router = APIRouter(prefix="/finetuning", route_class=OpenAIRoute, include_in_schema=False)

_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Nothing comes from another host and nothing runs that is not one of our files; Trusted Types make
# the browser refuse text that is turned into markup (job names and model output are not trusted).
_HEADERS = {
    "Cache-Control": "no-cache",  # asks each time, mostly answered 304
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class _Asset:
    """One file of the page. ``etag`` is the quoted hash of its content."""

    content: bytes
    media_type: str
    etag: str


@cache
def _assets() -> dict[str, _Asset]:
    """The files of ``flexllm_vllm/web`` by name, read once."""
    found = {}
    for entry in files("flexllm_vllm").joinpath("web").iterdir():
        media_type = _MEDIA_TYPES.get("." + entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[entry.name] = _Asset(content, media_type, etag)
    return found


@router.get("")
async def get_page(request: Request) -> Response:
    """The page."""
    return _answer(request, "index.html")


@router.get("/")
async def get_page_with_slash() -> Response:
    """To the address from which the page's relative addresses are right."""
    return RedirectResponse("../finetuning")


@router.get("/assets/{name}")
async def get_asset(request: Request, name: str) -> Response:
    """A script, style sheet or picture of the page."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    asset = _assets().get(name)
    if asset is None:
        raise ApiError(404, f"The page has no file '{name[:100]}'", code="not_found")
    headers = {**_HEADERS, "ETag": asset.etag}
    if asset.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)
