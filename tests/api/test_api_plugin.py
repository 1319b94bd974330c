"""The plugin inside vLLM's own parts: its model registry, its routes, its key check. Only the
engine is a stand-in."""

import asyncio
import io
import json
import re
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from sqlalchemy import select
from vllm.entrypoints.openai.models.api_router import router as models_router
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.lora.request import LoRARequest
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool

from flexllm_vllm.api.plugin import FinetuningEndpointPlugin
from flexllm_vllm.jobs import JobStore, LoraSpec, NewJob, TrainingSpec, schema
from tests.api.engine_stand_in import Engine

LINE = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    }
).encode()


def api_server(root: Path, tokenizer: Any = None) -> FastAPI:
    """An API process of vLLM, as far as it concerns us."""
    app = FastAPI()
    app.include_router(models_router)
    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    plugin = FinetuningEndpointPlugin()
    assert isinstance(plugin, EndpointPlugin)
    plugin.attach_router(app)
    engine: Any = Engine(root, tokenizer)
    app.state.openai_serving_models = OpenAIServingModels(
        engine, [BaseModelPath(name="demo", model_path="path/to/demo")]
    )
    app.state.openai_serving_models.lora_requests["static"] = LoRARequest("static", 1, "x")
    args = Namespace(chat_template=None, default_chat_template_kwargs=None)
    asyncio.run(plugin.init_state(engine, app.state, args))
    return app


@pytest.fixture
def served(
    tmp_path: Path, serve: Callable[[FastAPI], str], toy_tokenizer: Any
) -> tuple[FastAPI, str]:
    app = api_server(tmp_path, maybe_make_thread_pool(get_cached_tokenizer(toy_tokenizer), 1))
    return app, serve(app)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)


def test_a_finished_adapter_is_served_by_every_api_process(
    served: tuple[FastAPI, str], tmp_path: Path
) -> None:
    app, url = served
    other = api_server(tmp_path)
    client = client_of(url)
    assert [model.id for model in client.models.list()] == ["demo", "static"]
    file = client.files.create(file=("a.jsonl", LINE), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="demo", training_file=file.id)
    assert job.method.to_dict()["supervised"]["hyperparameters"]["max_seq_length"] == 128

    with JobStore(tmp_path) as engine:
        claimed = engine.claim_next_job(models=["demo"])
        engine.succeed(job.id, claimed.adapter_path)
        created = engine.adapters.get(claimed.adapter_name).created_at
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model

    for process in (app, other):
        models = process.state.openai_serving_models
        serving = SimpleNamespace(models=models, _is_model_supported=models.is_base_model)
        adapter = BaseServing._maybe_get_adapters(serving, SimpleNamespace(model=name))
        assert (adapter.lora_int_id, adapter.lora_path) == (
            500_000_000,
            str(claimed.adapter_path),
        )
        assert "ft:demo:local::none" not in models.lora_requests
        assert models.lora_requests.get("ft:demo:local::none") is None
        assert list(models.lora_requests) == ["static", name]
    card = client.models.list().data[-1]
    assert (card.id, card.created, card.to_dict()["parent"]) == (name, created, "demo")


def test_a_deleted_adapter_is_unloaded_and_served_by_no_process(
    served: tuple[FastAPI, str], tmp_path: Path
) -> None:
    app, url = served
    other = api_server(tmp_path)
    with JobStore(tmp_path) as store:
        adapter = store.adapters.add("ft:demo:local::a", tmp_path / "a", "demo", "import")
    models = [process.state.openai_serving_models for process in (app, other)]
    assert all(adapter.name in served.lora_requests for served in models)
    assert client_of(url).models.delete(adapter.name).deleted
    assert all(list(served.lora_requests) == ["static"] for served in models)
    assert models[0].engine_client.unloaded == [adapter.int_id]
    assert app.state.finetuning_adapters.base.adapter_bytes(1) == 4 * 30 * 78_080


def test_adapters_of_another_model_are_not_served(tmp_path: Path) -> None:
    with JobStore(tmp_path) as store:
        file = store.files.create(io.BytesIO(LINE), "a", "fine-tune")
        job_id, _ = store.new_job()
        spec = TrainingSpec(batch_size=1, max_seq_length=8, seed=0)
        job = NewJob(job_id, "other", "ft:other:local::x", file.id, LoraSpec(), spec, 1, {})
        store.create_job(job)
        store.succeed(store.claim_next_job().id, tmp_path)
    app = api_server(tmp_path)
    assert list(app.state.openai_serving_models.lora_requests) == ["static"]


def test_the_api_key_protects_all_routes(served: tuple[FastAPI, str]) -> None:
    app, url = served
    ours = [route for route in app.routes if "finetuning" in getattr(route, "tags", [])]
    assert len(ours) >= 29
    for route in ours:
        path = re.sub(r"\{\w+(:path)?\}", "x", route.path)
        for method in route.methods:
            assert httpx.request(method, url + path).status_code == 401


def test_a_server_delivers_webhooks_and_not_into_its_own_network(
    served: tuple[FastAPI, str], tmp_path: Path
) -> None:
    client = client_of(served[1])
    file = client.files.create(file=("a.jsonl", LINE), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="demo", training_file=file.id)
    with JobStore(tmp_path) as store:
        # As if the name had led elsewhere when the endpoint was created.
        store.webhooks.create("x", "https://localhost/", ["fine_tuning.job.cancelled"])
        client.fine_tuning.jobs.cancel(job.id)
        deadline = time.monotonic() + 15
        error = None
        while error is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            with store._database.read() as connection:
                error = connection.scalar(select(schema.webhook_deliveries.c.last_error))
    assert "not public" in error


def test_iterations_come_from_all_engines(served: tuple[FastAPI, str]) -> None:
    answer = httpx.get(
        f"{served[1]}/v1/finetuning/iterations?last=3", headers={"Authorization": "Bearer key"}
    )
    found = [(record["engine"], record["start_time"]) for record in answer.json()["data"]]
    assert found == [(1, 3), (0, 4), (1, 5)]


def test_without_the_flag_nothing_is_set_up(tmp_path: Path) -> None:
    engine: Any = Engine(tmp_path, None)
    engine.vllm_config.additional_config = {}
    state = SimpleNamespace()
    asyncio.run(FinetuningEndpointPlugin().init_state(engine, state, Namespace()))
    asyncio.run(FinetuningEndpointPlugin().init_state(None, state, Namespace()))
    assert vars(state) == {}
    assert list(tmp_path.iterdir()) == []
