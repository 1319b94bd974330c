import json
import socket
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from flexllm_vllm import __version__
from flexllm_vllm.commandline.main import main


def test_the_command_is_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["flexllm"].partition(":")
    assert getattr(import_module(module), function) is main


def test_help_and_version(run: Any) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(word in result.out for word in ("jobs", "files", "adapters", "Exit codes"))
    assert run("--version").out == f"flexllm {__version__}\n"
    assert run("jobs").exit_code == 2
    assert run("jobs", "lst").exit_code == 2


def test_a_server_that_is_not_there_is_exit_code_5(run: Any) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        result = run("jobs", "list", "--base-url", url)
        assert (result.exit_code, result.out) == (5, "")
        assert f"The server at {url} is not reachable" in result.err
        assert "refused" in result.err
        assert "Traceback" not in result.err
        result = run("jobs", "list", "--base-url", url, "--json")
        assert result.exit_code == 5
        assert json.loads(result.err)["error"]["type"] == "connection_error"


def test_an_unknown_job_is_a_request_error(run: Any) -> None:
    for command in ("show", "events", "cancel", "pause", "resume", "checkpoints"):
        result = run("jobs", command, "ftjob-none")
        assert result.exit_code == 1
        assert "ftjob-none" in result.err
    for command in ("show", "events"):
        assert run("jobs", command, "ftjob-none", "--follow").exit_code == 1


def test_a_server_without_finetuning_is_recognized(
    run: Any, serve: Callable[[FastAPI], str]
) -> None:
    url = serve(FastAPI())
    result = run("jobs", "list", "--base-url", f"{url}/v1")
    assert result.exit_code == 1
    assert "--enable-finetuning" in result.err
    assert "/v1?" in result.err


def test_a_web_page_is_no_server(run: Any, serve: Callable[[FastAPI], str]) -> None:
    app = FastAPI()

    @app.get("/{path:path}", response_class=HTMLResponse)
    def page(path: str) -> str:
        return "<html>Welcome</html>"

    result = run("jobs", "list", "--base-url", serve(app))
    assert result.exit_code == 5
    assert "is no API server" in result.err


def test_a_gateways_error_is_shown_in_a_line(run: Any, serve: Callable[[FastAPI], str]) -> None:
    app = FastAPI()

    @app.get("/{path:path}")
    def fail(path: str) -> HTMLResponse:
        return HTMLResponse("<html>\nupstream\n</html>", status_code=502)

    result = run("jobs", "list", "--base-url", serve(app))
    assert (result.exit_code, result.err) == (1, "Error: HTTP 502: <html>\n")


@pytest.mark.parametrize("way", ["option", "environment"])
def test_the_key_is_sent(
    run: Any, serve: Callable[[FastAPI], str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    app = FastAPI()

    @app.get("/v1/files")
    def files(request: Request) -> Any:
        if request.headers.get("authorization") != "Bearer sk-1":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return {"object": "list", "data": [], "has_more": False}

    url = f"{serve(app)}/v1"
    result = run("files", "list", "--base-url", url)
    assert result.exit_code == 1
    assert "Unauthorized" in result.err
    if way == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    option = ("--api-key", "sk-1") if way == "option" else ()
    result = run("files", "list", "--base-url", url, *option)
    assert result.exit_code == 0
    assert "sk-1" not in run("files", "list", "--help").out


def test_a_folder_that_cannot_be_written_is_an_error(
    run: Any, serve: Callable[[FastAPI], str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = run("adapters", "export", "ft:a", tmp_path / "file" / "dir")
    assert result.exit_code == 1
    assert "Traceback" not in result.err
