"""What no route of ours takes: unknown paths (404) and methods (405) below our prefixes."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.api.prefixes import is_ours, route_path

Handler = Callable[[Request, Exception], Awaitable[Response]]


def attach_unmatched(app: FastAPI) -> None:
    """Answer in OpenAI's form where the router finds nothing below our prefixes.

    vLLM's own handler is for the exceptions that its endpoints raise; those of the router are
    Starlette's and are left to the handler that was there before.
    """
    other = cast(Handler, app.exception_handlers[HTTPException])

    async def answer(request: Request, error: Exception) -> Response:
        if not is_ours(request.scope):
            return await other(request, error)
        assert isinstance(error, HTTPException)
        return _refusal(request, error).response()

    app.add_exception_handler(HTTPException, answer)


def _refusal(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {route_path(request.scope)}"
    if error.status_code == 404:
        return ApiError(404, f"Invalid URL ({where})", code="unknown_url")
    if error.status_code == 405:
        allowed = ", ".join(sorted(_allowed_methods(request)))
        return ApiError(
            405,
            f"Not allowed to {where}; allowed: {allowed}",
            code="method_not_supported",
            headers={"Allow": allowed},
        )
    return ApiError(error.status_code, str(error.detail))


def _allowed_methods(request: Request) -> set[str]:
    """Of all routes of the path: the router itself names those of the first one only."""
    methods: set[str] = set()
    routes: list[BaseRoute] = request.app.router.routes
    for route in routes:
        match, _ = route.matches(request.scope)
        if match is Match.PARTIAL:
            methods |= cast(Any, route).methods
    return methods
