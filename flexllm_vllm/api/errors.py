"""Errors in OpenAI's form, on our own routes only.

vLLM installs its exception handlers on the whole application, in a form of its own. Routes of class
:class:`OpenAIRoute` turn every exception into a response themselves and leave the others alone.
"""

import errno
from collections.abc import Callable, Coroutine, Mapping
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
    IdempotencyConflictError,
    IdempotencyPendingError,
    InsufficientStorageError,
    JobNotFoundError,
    JobStateError,
    MergeNotFoundError,
    QuotaExceededError,
    TooManyFilesError,
    TooManyMergesError,
    TooManyQueuedJobsError,
    UploadMismatchError,
    UploadNotFoundError,
    UploadStateError,
    WebhookEndpointNotFoundError,
    WebhookLimitError,
)
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status code.
        param: the parameter that is wrong, as a path into the request, or None.
        code: machine-readable reason, or None.
        type: OpenAI's class of errors; None: the usual one of the status.
        retry_after: seconds after which a refusal is worth another try; None: it lasts.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        type: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = _text(message)
        self.param = None if param is None else _text(param)
        self.code = code
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        super().__init__(message)

    def response(self) -> JSONResponse:
        """``{"error": {"message", "type", "param", "code"}}``."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return JSONResponse({"error": error}, status_code=self.status, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        """The stock client repeats every 409, 429 and 5xx, whole uploads too, unless it is told."""
        if self.retry_after is not None:
            return {**self.headers, "Retry-After": str(self.retry_after)}
        if self.status in (409, 413, 429, 507):
            return {**self.headers, "x-should-retry": "false"}
        return self.headers


def _text(text: str) -> str:
    """What can be written as UTF-8: a message may quote a string of the user's that cannot."""
    return text.encode(errors="replace").decode()


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
        case WebhookEndpointNotFoundError():
            return ApiError(404, str(error), "webhook_endpoint_id")
        case WebhookLimitError():
            return invalid(str(error), None, "webhook_limit_reached")
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
        case IdempotencyConflictError():
            return ApiError(409, str(error), "Idempotency-Key", "idempotency_key_in_use")
        case IdempotencyPendingError():
            return ApiError(
                409, str(error), "Idempotency-Key", "idempotency_key_pending", retry_after=1
            )
        case QuotaExceededError():
            kind = "insufficient_quota"
            return ApiError(429, str(error), None, kind, type=kind)
        case UnicodeEncodeError():
            return invalid("A string holds half of a surrogate pair, which is no character")
        case UploadNotFoundError():
            return ApiError(404, str(error), "upload_id")
        case UploadStateError():
            return invalid(str(error), "upload_id", "invalid_upload_state")
        case UploadMismatchError():
            return invalid(str(error), error.param, "invalid_upload")
        case TooManyFilesError():
            return ApiError(429, str(error), None, "too_many_files")
        case TooManyQueuedJobsError():
            return ApiError(429, str(error), None, "too_many_queued_jobs", retry_after=30)
        case InsufficientStorageError():
            return ApiError(507, str(error), None, "insufficient_storage")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            message = "The disk of this server is full"
            return ApiError(507, message, None, "insufficient_storage")
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
