"""Which routes of the whole application, vLLM's included, answer without a key."""

import asyncio
import hashlib
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Mount
from vllm_application import vllm_application

# All of them; a new one must be put here, and into docs/access.md, by somebody who has thought of
# it.
OPEN = {
    "/docs",
    "/docs/oauth2-redirect",
    "/finetuning",
    "/finetuning/",
    "/finetuning/assets/x",
    "/health",
    "/load",
    "/metrics",
    "/metrics/",
    "/openapi.json",
    "/ping",
    "/redoc",
    "/version",
}
# Beside these vLLM's check of --api-key leaves open, as ever.
OPEN_OF_VLLM = {
    "/adapters",  # SageMaker's, once VLLM_ALLOW_RUNTIME_LORA_UPDATING was set in this process
    "/adapters/x",
    "/classify",
    "/detokenize",
    "/generative_scoring",
    "/invocations",
    "/is_scaling_elastic_ep",
    "/kv_event_sources",
    "/pooling",
    "/rerank",
    "/scale_elastic_ep",
    "/score",
    "/tokenize",
}


def answers(app: Any) -> dict[tuple[str, str], int]:
    """The status of each route and method, asked without a key. Nothing behind them is set up."""

    async def ask() -> dict[tuple[str, str], int]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            found = {}
            for route in app.routes:
                path = re.sub(r"\{\w+(:path)?\}", "x", route.path)
                if isinstance(route, Mount):
                    path += "/"
                for method in getattr(route, "methods", None) or {"GET"}:
                    for query in ("", "?stream=true"):
                        answer = await client.request(method, path + query)
                        found[method, path + query] = answer.status_code
            return found

    return asyncio.run(ask())


def open_paths(app: Any) -> set[str]:
    return {path.split("?")[0] for (_, path), status in answers(app).items() if status != 401}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"sk-acme").hexdigest()
    path.write_text(f'[[keys]]\nsha256 = "{digest}"\norganization = "acme"\n')
    return path


def test_with_a_keys_file_only_these_are_open(tmp_path: Path, keys_file: Path) -> None:
    flags = ["--finetuning-keys-file", str(keys_file)]
    app = vllm_application(tmp_path / "store", flags)
    assert open_paths(app) == OPEN
    assert ("GET", "/v1/fine_tuning/jobs/x/events?stream=true") in answers(app)


def test_vllms_routes_for_development_are_no_exception(
    tmp_path: Path, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = vllm_application(tmp_path / "store", ["--finetuning-keys-file", str(keys_file)])
    paths = {route.path for route in app.routes}
    assert {"/sleep", "/collective_rpc", "/v1/load_lora_adapter"} <= paths
    assert open_paths(app) == OPEN


def test_with_an_api_key_all_of_ours_are_closed(tmp_path: Path) -> None:
    app = vllm_application(tmp_path / "store", ["--api-key", "key"])
    assert open_paths(app) <= OPEN | OPEN_OF_VLLM
    ours = [route for route in app.routes if "finetuning" in getattr(route, "tags", [])]
    assert len(ours) >= 20


def test_the_list_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "access.md").read_text()
    for path in OPEN:
        top = "/" + path.split("/")[1]
        assert f"`{top}`" in text
