"""What every command has: the server's address, the key, the form of its results, its errors."""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import openai
import typer

from flexllm_vllm.commandline.errors import CommandError, ExitCode, as_command_error
from flexllm_vllm.commandline.output import Output

DEFAULT_BASE_URL = "http://localhost:8000/v1"

BaseUrl = Annotated[
    str,
    typer.Option(
        envvar="OPENAI_BASE_URL", metavar="URL", help="Address of the server, with its /v1."
    ),
]
ApiKey = Annotated[
    str, typer.Option(envvar="OPENAI_API_KEY", metavar="KEY", help="Key of the server, if any.")
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON.")]


@dataclass(frozen=True)
class Session:
    """A server and where its answers are shown."""

    client: openai.OpenAI
    output: Output
    base_url: str

    def come_back(self, command: str) -> str:
        """A command line that reaches the same server."""
        known = self.base_url == (os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL)
        return f"flexllm {command}" + ("" if known else f" --base-url {self.base_url}")


def open_session(base_url: str, api_key: str, as_json: bool) -> Session:
    """A session whose requests are made once; what repeats them decides so itself."""

    def check_answer(response: Any) -> None:
        kind = response.headers.get("content-type", "")
        if response.is_success and kind.startswith("text/html"):
            raise CommandError(f"What answers at {base_url} is no API server", ExitCode.UNREACHABLE)

    client = openai.OpenAI(
        base_url=base_url,
        api_key=api_key or "none",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(event_hooks={"response": [check_answer]}),
    )
    return Session(client, Output(as_json), base_url)


def server_command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], None]:
    """Add a function whose first parameter is the :class:`Session` to ``app`` as a command.

    The command has the options of the session beside those of the function. What the function
    raises of :class:`CommandError`, of the client's and of the file system's errors becomes one
    message and an exit code.
    """

    def add(function: Callable[..., None]) -> None:
        def command(*, base_url: str, api_key: str, as_json: bool, **options: Any) -> None:
            session = open_session(base_url or DEFAULT_BASE_URL, api_key, as_json)
            try:
                with session.client:
                    function(session, **options)
            except BrokenPipeError:
                raise
            except CommandError as error:
                _report(session.output, error)
            except (openai.OpenAIError, OSError) as error:
                _report(session.output, as_command_error(error, session.base_url))

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        own = list(inspect.signature(function).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter("base_url", keyword, default=DEFAULT_BASE_URL, annotation=BaseUrl),
            inspect.Parameter("api_key", keyword, default="", annotation=ApiKey),
            inspect.Parameter("as_json", keyword, default=False, annotation=Json),
        ]
        parameters = [*(parameter.replace(kind=keyword) for parameter in own), *shared]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(command)

    return add


def _report(output: Output, error: CommandError) -> None:
    if output.as_json:
        print(json.dumps({"error": error.error}), file=output.messages.file)
    else:
        output.note(f"Error: {error.text()}", style="red")
    raise typer.Exit(error.exit_code)
