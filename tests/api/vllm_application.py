"""The application that vLLM builds, with our routes and the key checks; only the engine and the
generation of text are stand-ins."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from engine_stand_in import Engine
from fastapi import FastAPI
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from flexllm_vllm.plugin import register

TASKS = ("generate", "embed", "classify", "score")


class Chat:
    """vLLM's look for the model, and then a text of two pieces."""

    def __init__(self, models: OpenAIServingModels) -> None:
        self.serving = BaseServing.__new__(BaseServing)
        self.serving.models = models
        self.serving.request_logger = None
        self.may_end = False

    def create_error_response(self, *args: Any, **options: Any) -> Any:
        return self.serving.create_error_response(*args, **options)

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        async def pieces() -> AsyncIterator[str]:
            lora = self.serving._maybe_get_adapters(request)
            yield f"data: {lora.lora_name if lora else 'base'}\n\n"
            while not self.may_end:
                await asyncio.sleep(0.005)
            yield "data: [DONE]\n\n"

        return await self.serving._check_model(request) or pieces()


def vllm_application(root: Path, flags: Sequence[str], tokenizer: Any = None) -> FastAPI:
    """An API process of ``vllm serve --enable-finetuning`` with these flags."""
    register()
    from vllm.entrypoints.launchers import app as launcher

    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", "demo", "--enable-finetuning", *flags])
    app = launcher.build_app(args, TASKS)
    engine: Any = Engine(root, tokenizer, log_stats=False)
    models = OpenAIServingModels(engine, [BaseModelPath(name="demo", model_path="path/to/demo")])
    models.lora_requests["static"] = LoRARequest("static", 1, "x")
    app.state.openai_serving_models = models
    app.state.openai_serving_chat = Chat(models)
    app.state.engine_client = engine
    app.state.log_stats = False
    for plugin in app.state.endpoint_plugins:
        asyncio.run(plugin.init_state(engine, app.state, args))
    return app
