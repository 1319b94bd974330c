"""The server of the web page, and what tests do in place of its engine."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import openai
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from playwright.sync_api import Page
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from flexllm_vllm.api.adapters import serve_adapters
from flexllm_vllm.scheduler.iterations import Iteration, IterationLog
from tests.api.conftest import Server

LAPTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}


@dataclass
class Speaker:
    """What the chat route says, in pieces; it waits before the last one while ``hold`` is set."""

    pieces: list[str] = field(default_factory=lambda: ["Hello", " from ", "the model"])
    hold: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    cut_off: int = 0


@dataclass
class Site:
    """The server, and what the tests do in place of its engine."""

    server: Server
    iterations: IterationLog
    speaker: Speaker
    model: str

    @property
    def url(self) -> str:
        return f"{self.server.url}/finetuning"

    def create_job(self, client: openai.OpenAI, file_id: str, **options: Any) -> str:
        options = {"model": self.model, "training_file": file_id, **options}
        return client.fine_tuning.jobs.create(**options).id

    def step(self, job_id: str, step: int, total: int, loss: float, **metrics: Any) -> None:
        """One optimizer step of a running job."""
        values = {"train_loss": loss, "learning_rate": 1e-3, "grad_norm": 0.8}
        values |= {"tokens": 640, "tokens_per_second": 210.0, **metrics}
        self.server.store.record_progress(job_id, step, total, step * 640)
        self.server.store.record_step(job_id, step, values)

    def iterate(self, **values: Any) -> None:
        """One engine iteration, ending now."""
        defaults = {
            "duration_ms": 80.0,
            "target_ms": 92.0,
            "predicted_ms": 78.0,
            "decode_tokens": 2,
            "prefill_tokens": 0,
            "finetuning_forward_tokens": 16,
            "finetuning_backward_tokens": 0,
            "finetuning_loss_tokens": 0,
        }
        self.iterations.add(Iteration(**{"start_time": time.time(), **defaults, **values}))


@dataclass
class Watched:
    """What a page must never do: write errors, or ask another host."""

    errors: list[str] = field(default_factory=list)
    other_hosts: list[str] = field(default_factory=list)


OpenPage = Callable[..., Page]


def add_models(server: Server, name: str) -> None:
    engine: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=512, model="path/to/demo"),
        renderer=None,
        input_processor=None,
    )
    models = OpenAIServingModels(engine, [BaseModelPath(name=name, model_path="path/to/demo")])
    serve_adapters(models, server.store)
    server.app.state.openai_serving_models = models


def add_chat(app: FastAPI, speaker: Speaker) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        speaker.asked.append(body)
        return StreamingResponse(_speak(request, speaker), media_type="text/event-stream")


async def _speak(request: Request, speaker: Speaker) -> AsyncIterator[str]:
    ended = False
    try:
        for i, piece in enumerate(speaker.pieces):
            while speaker.hold.is_set() and i == len(speaker.pieces) - 1:
                await asyncio.sleep(0.02)
            yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        usage = {"completion_tokens": len(speaker.pieces)}
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
        ended = True
    finally:
        speaker.cut_off += not ended


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
