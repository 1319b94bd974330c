"""Exit codes, and what a user is told when a command cannot do its work."""

from enum import IntEnum
from typing import Any

import openai


class ExitCode(IntEnum):
    """What a script learns from the command."""

    SUCCEEDED = 0
    REQUEST_ERROR = 1
    USAGE = 2
    JOB_FAILED = 3
    JOB_CANCELLED = 4
    UNREACHABLE = 5
    INTERRUPTED = 130


class CommandError(Exception):
    """A command that ends with a message in place of a result.

    Attributes:
        exit_code: with which the process ends.
        error: the error in OpenAI's form: ``message``, ``type``, ``param``, ``code``.
    """

    def __init__(
        self,
        message: str,
        exit_code: ExitCode = ExitCode.REQUEST_ERROR,
        **fields: Any,
    ) -> None:
        self.exit_code = exit_code
        self.error = {"message": message, "type": None, "param": None, "code": None, **fields}
        super().__init__(message)

    def text(self) -> str:
        """Message and parameter, for people."""
        param = self.error["param"]
        return f"{self.error['message']} (parameter: {param})" if param else str(self)


def as_command_error(error: openai.OpenAIError | OSError, base_url: str) -> CommandError:
    """What a user is told of an exception of the client or of the file system."""
    match error:
        case openai.APIStatusError():
            return _status_error(error, base_url)
        case openai.APIConnectionError(__cause__=CommandError() as cause):
            return cause
        case openai.APIConnectionError():
            reason = str(error.__cause__ or error).strip() or type(error.__cause__).__name__
            return CommandError(
                f"The server at {base_url} is not reachable: {reason}. Its address is taken from "
                "--base-url or OPENAI_BASE_URL",
                ExitCode.UNREACHABLE,
                type="connection_error",
            )
        case OSError(strerror=str() as reason):
            where = f": {error.filename}" if error.filename else ""
            return CommandError(f"{reason}{where}")
        case _:
            return CommandError(str(error))


def _status_error(error: openai.APIStatusError, base_url: str) -> CommandError:
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        fields: dict[str, Any] = {name: body.get(name) for name in ("type", "param", "code")}
        message = body["message"]
    else:
        fields = {"type": "http_error"}
        detail = body.get("detail") if isinstance(body, dict) else body
        text = str(detail or error.response.reason_phrase).strip()
        message = text.splitlines()[0][:200] if text else ""
    if error.status_code == 404 and message == "Not Found":
        message = (
            f"{base_url} does not know this request. Was the server started with "
            "--enable-finetuning, and does the address end in /v1?"
        )
    elif fields["type"] == "http_error":
        message = f"HTTP {error.status_code}: {message}"
    return CommandError(message, **fields)
