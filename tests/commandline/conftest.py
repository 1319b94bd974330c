"""The command line against the real HTTP server of tests/api."""

import io
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from fastapi import Response
from fastapi.responses import JSONResponse
from vllm.entrypoints.openai.models.api_router import router as models_router
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from flexllm_vllm.api.adapters import serve_adapters
from flexllm_vllm.commandline import follow, patience
from flexllm_vllm.commandline.main import main
from tests.api.conftest import Server, client, serve, server, toy_tokenizer, upload

__all__ = ["client", "serve", "server", "toy_tokenizer", "upload"]

LINES = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
) * 2


@dataclass(frozen=True)
class Result:
    """What a command has come to."""

    exit_code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def models_server(server: Server) -> Server:
    """The server, with vLLM's own ``/v1/models`` over the adapters of the store."""
    engine: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=512, model="path/to/demo"),
        renderer=None,
        input_processor=None,
    )
    models = OpenAIServingModels(engine, [BaseModelPath(name="demo", model_path="path/to/demo")])
    serve_adapters(models, server.store)
    server.app.state.openai_serving_models = models
    server.app.include_router(models_router)
    _add_adapter_routes(server)
    return server


def _add_adapter_routes(server: Server) -> None:
    """The adapters' routes as the API describes them, over the store and the adapters' folders."""

    @server.app.delete("/v1/models/{name:path}")
    def delete(name: str) -> dict[str, Any]:
        server.store.adapters.delete(name)
        return {"id": name, "object": "model", "deleted": True}

    @server.app.get("/v1/finetuning/adapters/{name:path}/content")
    def content(name: str) -> Response:
        adapter = server.store.adapters.get(name)
        if adapter is None:
            error = {"message": f"No adapter '{name}'", "type": "invalid_request_error"}
            error |= {"param": "name", "code": "model_not_found"}
            return JSONResponse({"error": error}, status_code=404)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for path in sorted(Path(adapter.path).iterdir()):
                tar.add(path, path.name)
        return Response(archive.getvalue(), media_type="application/gzip")


@pytest.fixture
def create(client: openai.OpenAI, upload: Callable[..., str]) -> Callable[..., str]:
    """Create a job; returns its id."""

    def create(**options: Any) -> str:
        options = {"model": "demo", "training_file": upload(), **options}
        return client.fine_tuning.jobs.create(**options).id

    return create


@pytest.fixture
def run(
    models_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command line against the server, in this process."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{models_server.url}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(follow, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.02)

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["flexllm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """A training file of two examples."""
    path = tmp_path / "train.jsonl"
    path.write_text(LINES)
    return path
