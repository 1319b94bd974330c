"""Errors in OpenAI's form, on our own routes only.

vLLM installs its exception handlers on the whole application, in a form of its own. Routes of class
:class:`OpenAIRoute` turn every exception into a response themselves and leave the others alone.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from flexllm_vllm.data.errors import DataError, UnsupportedTokenizerError
from flexllm_vllm.jobs.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    CursorNotFoundError,
    FileInUseError,
    FileNotStoredError,
    JobNotFoundError,
    JobStateError,
    MergeNotFoundError,
    TooManyMergesError,
)
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status code.
        param: the parameter that is wrong, as a path into the request, or None.
        code: machine-readable reason, or None.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        super().__init__(message)

    def response(self) -> JSONResponse:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        return JSONResponse({"error": error}, status_code=self.status)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param, code)


class OpenAIRoute(APIRoute):
    """A route whose errors have OpenAI's form. Nothing it raises reaches vLLM's application."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return as_api_error(error, f"{request.method} {self.path}").response()

        return handle_errors


def as_api_error(error: Exception, where: str) -> ApiError:
    """What a user is told of an exception; the unexpected is logged and kept from the user."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _validation_error(error)
        case DataError():
            return invalid(str(error), "training_file", "invalid_training_file")
        case UnsupportedTokenizerError():
            return invalid(str(error), "model", "unsupported_model")
        case FileNotStoredError() | JobNotFoundError():
            param = "fine_tune_id" if isinstance(error, JobNotFoundError) else "id"
            return ApiError(404, str(error), param)
        case AdapterNotFoundError():
            return ApiError(404, str(error), "model", "model_not_found")
        case AdapterInUseError():
            return ApiError(409, str(error), "model", "adapter_in_use")
        case MergeNotFoundError():
            return ApiError(404, str(error), "merge_id")
        case TooManyMergesError():
            return ApiError(429, str(error), None, "too_many_merges")
        case CursorNotFoundError():
            return invalid(str(error), "after")
        case FileInUseError():
            return ApiError(409, str(error), "file_id", "file_in_use")
        case JobStateError():
            return invalid(str(error), None, "invalid_job_state")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case _:
            logger.exception("%s failed", where, exc_info=error)
            return ApiError(500, "The server had an error while processing your request.")


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that pydantic found wrong."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not valid JSON")
        return invalid(f"We could not parse the JSON body of your request: {reason}")
    param = ".".join(location[1:]) or None  # the first part says body, query or path
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {param}", param, "unknown_param")
    if first["type"] == "missing":
        what = f"you must provide '{param}'" if param else "you must provide a JSON body"
        return invalid(f"Missing required parameter: {what}", param, "missing_param")
    return invalid(f"Invalid value for '{param}': {message}" if param else message, param)
