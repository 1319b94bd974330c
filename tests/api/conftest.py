"""A real HTTP server with our routes and a real store; tests drive it with the stock client.

The engine is the only part that is missing: tests call the store's engine methods in its place.
"""

import importlib.util
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from peft_adapters import TINY_LLAMA
from vllm.entrypoints.openai.models.api_router import router as models_router
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from flexllm_vllm.adapter_files.base_linears import base_linears
from flexllm_vllm.api.adapter_removal import AdapterRemover
from flexllm_vllm.api.adapter_service import AdapterService
from flexllm_vllm.api.adapters import serve_adapters
from flexllm_vllm.api.merger import Merger
from flexllm_vllm.api.plugin import attach_routes
from flexllm_vllm.api.service import FinetuningService
from flexllm_vllm.api.tracking import Tracking
from flexllm_vllm.api.webhook_sender import WebhookSender
from flexllm_vllm.data import ExampleTokenizer
from flexllm_vllm.jobs import JobStore
from flexllm_vllm.scheduler.iterations import Iteration
from tests.api.engine_stand_in import Engine
from tests.api.openai_description import check


def _toy_tokenizer() -> Any:
    """The tokenizer of tests/data, which pytest may not have on its path."""
    path = Path(__file__).parents[1] / "data" / "toy_tokenizer.py"
    spec = importlib.util.spec_from_file_location("toy_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.toy_tokenizer()


@dataclass
class Server:
    """A running server and what stands behind it."""

    url: str
    app: FastAPI
    service: FinetuningService
    store: JobStore
    adapters: AdapterService
    engine: Engine

    def client(self) -> openai.OpenAI:
        """The stock client; every answer it gets is held against OpenAI's description."""
        http_client = openai.DefaultHttpxClient(event_hooks={"response": [check]})
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http_client
        )


def _adapter_service(app: FastAPI, store: JobStore, engine: Engine) -> AdapterService:
    """As the plugin builds it, with vLLM's own registry and routes of models; impatient."""
    base = base_linears(TINY_LLAMA)
    models = OpenAIServingModels(
        cast("Any", engine),
        [BaseModelPath(name=name, model_path="path/to/demo") for name in ("demo", "alias")],
    )
    models.lora_requests["static"] = LoRARequest("static", 1, "path/to/static")
    serve_adapters(models, store)
    app.state.openai_serving_models = models
    app.include_router(models_router, include_in_schema=False)  # it is not ours
    return AdapterService(
        store=store,
        base_models=("demo", "alias"),
        base=base,
        max_lora_rank=32,
        remover=AdapterRemover(
            store, engine.adapters_in_use, engine.remove_lora, grace_s=0, poll_s=0.05
        ),
        merger=Merger(store, ("demo", "alias"), base, 32, poll_s=0.05),
    )


async def _iterations(last: int) -> list[dict[str, Any]]:
    records = [Iteration(1.5e9, 80.0, None, 75.5, i, 0, 32, 64, 8) for i in range(last)]
    return [{"engine": 0, **asdict(record)} for record in records]


def _run_server(app: FastAPI, **config: Any) -> tuple[uvicorn.Server, threading.Thread, str]:
    """Serve an application on a free local port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def run_server() -> Callable[..., tuple[uvicorn.Server, threading.Thread, str]]:
    """For tests that end a server themselves: ``should_exit``, then join the thread."""
    return _run_server


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Serve applications until the test ends; returns an application's address."""
    started = []

    def serve(app: FastAPI) -> str:
        running, thread, url = _run_server(app)
        started.append((running, thread))
        return url

    yield serve
    _stop(started)


def _stop(started: list[tuple[uvicorn.Server, threading.Thread]]) -> None:
    for running, thread in started:
        running.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def toy_tokenizer() -> Any:
    """A real fast tokenizer with a chat template."""
    return _toy_tokenizer()


@pytest.fixture
def start_server(tmp_path: Path, toy_tokenizer: Any) -> Iterator[Callable[[], Server]]:
    """Start API processes, as it were, on one store."""
    stores, started = [], []

    def start() -> Server:
        app = FastAPI()
        attach_routes(app)
        store = JobStore(tmp_path / "store")
        stores.append(store)

        def find_adapter(name: str) -> str | None:
            adapter = store.adapters.get(name)
            return adapter.path if adapter else None

        service = FinetuningService(
            store=store,
            load_tokenizer=lambda: ExampleTokenizer(toy_tokenizer),
            base_models=("demo", "alias"),
            max_lora_rank=32,
            max_seq_length=256,
            fetch_iterations=_iterations,
            find_adapter=find_adapter,
            num_layers=30,
        )
        engine = Engine()
        adapters = _adapter_service(app, store, engine)
        app.state.finetuning = service
        app.state.finetuning_adapters = adapters
        app.state.finetuning_webhooks = WebhookSender(store)
        app.state.finetuning_tracking = Tracking(store, poll_s=0.05)
        running, thread, url = _run_server(app)
        started.append((running, thread))
        return Server(url, app, service, store, adapters, engine)

    yield start
    _stop(started)  # first: their tasks look into the stores
    for store in stores:
        store.close()


@pytest.fixture
def server(start_server: Callable[[], Server]) -> Server:
    return start_server()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def upload(client: openai.OpenAI) -> Callable[..., str]:
    """Upload examples, two short ones by default; returns the file's id."""

    def upload(*lines: Any) -> str:
        rows = lines or [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in (("Hi", "Hello"), ("Bye", "See you"))
        ]
        content = "\n".join(json.dumps(row) for row in rows).encode()
        return client.files.create(file=("data.jsonl", content), purpose="fine-tune").id

    return upload
