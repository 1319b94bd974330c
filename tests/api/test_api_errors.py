"""Errors below our prefixes, whoever finds them."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.api.prefixes import PREFIXES


def assert_openais_form(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    return error


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_unknown_path_is_a_404(server: Any, prefix: str) -> None:
    for path in (f"{prefix}/a/b/c/d/e", f"{prefix}/%2e%2e/x/y/z"):
        for method in ("GET", "POST", "DELETE"):
            error = assert_openais_form(httpx.request(method, server.url + path), 404)
            assert error["message"].startswith(f"Invalid URL ({method} ")


def test_another_method_is_a_405_that_names_all_allowed_ones(server: Any) -> None:
    answer = httpx.put(f"{server.url}/v1/files")
    assert_openais_form(answer, 405)
    assert answer.headers["allow"] == "GET, POST"
    answer = httpx.patch(f"{server.url}/v1/files/file-x")
    assert_openais_form(answer, 405)
    assert answer.headers["allow"] == "DELETE, GET"


def test_other_paths_are_left_alone(server: Any) -> None:
    for path in ("/v1/filesystem", "/nothing"):
        assert httpx.get(server.url + path).json() == {"detail": "Not Found"}


def test_a_root_path_is_taken_off(server: Any) -> None:
    server.app.root_path = "/proxy"
    answer = httpx.get(f"{server.url}/proxy/v1/files/a/b/c")
    error = assert_openais_form(answer, 404)
    assert error["message"] == "Invalid URL (GET /v1/files/a/b/c)"


def test_the_client_is_told_whether_to_try_again(serve: Any) -> None:
    app = FastAPI()

    @app.get("/lasting/{status}")
    async def lasting(status: int) -> Any:
        return ApiError(status, "no").response()

    @app.get("/passing/{status}")
    async def passing(status: int) -> Any:
        return ApiError(status, "not now", retry_after=2).response()

    url = serve(app)
    for status in (409, 429):
        headers = httpx.get(f"{url}/lasting/{status}").headers
        assert (headers["x-should-retry"], "retry-after" in headers) == ("false", False)
        headers = httpx.get(f"{url}/passing/{status}").headers
        assert ("x-should-retry" in headers, headers["retry-after"]) == (False, "2")
    assert "x-should-retry" not in httpx.get(f"{url}/lasting/400").headers
