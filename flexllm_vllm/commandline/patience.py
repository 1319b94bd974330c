"""Requests that outlast a server that is away for a while."""

import time
from collections.abc import Callable
from typing import TypeVar

import openai

from flexllm_vllm.commandline.errors import CommandError, ExitCode, as_command_error

T = TypeVar("T")

FIRST_DELAY = 0.5  # seconds to the second try; each is twice the one before
LONGEST_DELAY = 15.0
_PASSING = (408, 429, 500, 502, 503, 504)


class Patience:
    """Repeats a request while the server does not answer.

    Args:
        base_url: of the server, for messages.
        notice: told once that the server is away, and once that it is back.
        seconds: how long it may be away.
    """

    def __init__(self, base_url: str, notice: Callable[[str], None], seconds: float) -> None:
        self._base_url = base_url
        self._notice = notice
        self._seconds = seconds

    def call(self, request: Callable[[], T]) -> T:
        """The answer to a request that may be made more than once.

        Raises:
            CommandError: no answer within the time.
            openai.APIError: an answer that will not change.
        """
        gone_since: float | None = None
        delay = FIRST_DELAY
        while True:
            try:
                answer = request()
            except openai.APIError as error:
                if not _is_passing(error):
                    raise
                now = time.monotonic()
                if gone_since is None:
                    gone_since = now
                    reason = as_command_error(error, self._base_url)
                    self._notice(f"{reason}. Trying again for {_duration(self._seconds)}")
                if now + delay > gone_since + self._seconds:
                    raise CommandError(
                        f"The server at {self._base_url} has not answered for "
                        f"{_duration(self._seconds)}",
                        ExitCode.UNREACHABLE,
                        type="connection_error",
                    ) from error
                time.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)
            else:
                if gone_since is not None:
                    self._notice("The server answers again")
                return answer


def _is_passing(error: openai.APIError) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in _PASSING
    return isinstance(error, openai.APIConnectionError)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
