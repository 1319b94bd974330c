"""The endpoint plugin: routes into vLLM's API server, and the service behind them."""

import asyncio
import copy
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.renderers.chat_utils import load_chat_template

from flexllm_vllm.adapter_files.base_linears import base_linears
from flexllm_vllm.api import (
    adapter_routes,
    files,
    fine_tunes,
    fine_tuning,
    iterations,
    merge_routes,
    models,
    unsupported,
    uploads,
    web,
    webhooks,
)
from flexllm_vllm.api.adapter_removal import AdapterRemover
from flexllm_vllm.api.adapter_service import AdapterService
from flexllm_vllm.api.adapters import ServedAdapters, serve_adapters
from flexllm_vllm.api.housekeeping import Housekeeping
from flexllm_vllm.api.limits import Limits
from flexllm_vllm.api.merger import Merger
from flexllm_vllm.api.metrics import FinetuningMetrics, attach_metrics, count_queued_jobs
from flexllm_vllm.api.service import FinetuningService
from flexllm_vllm.api.tracker_access import TrackerAccess
from flexllm_vllm.api.tracking import Tracking
from flexllm_vllm.api.unmatched import attach_unmatched
from flexllm_vllm.api.webhook_sender import WebhookSender
from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.data.tokenize import ExampleTokenizer
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)


# For /openapi.json alone: keys are checked before a request comes to a route (access.py).
_BEARER = HTTPBearer(auto_error=False, description="A key of --api-key or of the keys file.")


def attach_routes(app: FastAPI) -> None:
    """Add all routes. All lie under /v1, which vLLM's ``--api-key`` protects, except the web page,
    which holds no data."""
    # Merges before adapters: their paths are names of adapters, too.
    for module in (
        files,
        uploads,
        fine_tuning,
        fine_tunes,
        iterations,
        webhooks,
        merge_routes,
        adapter_routes,
        models,
        unsupported,
    ):
        app.include_router(module.router, dependencies=[Security(_BEARER)])
    app.include_router(web.router)
    attach_unmatched(app)


class FinetuningEndpointPlugin:
    """vLLM's ``EndpointPlugin`` (see ``vllm/plugins/endpoint_plugins/interface.py``)."""

    name = "flexllm_finetuning"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Called by vLLM while the application is built."""
        attach_routes(app)
        attach_metrics(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Called by vLLM when the engine is up. Without an engine all our routes answer 503."""
        if engine_client is None:
            return
        vllm_config = engine_client.vllm_config
        config = FinetuningConfig.from_vllm_config(vllm_config)
        if config is None:
            return
        served = state.openai_serving_models
        store = await asyncio.to_thread(JobStore, config.dir)
        await asyncio.to_thread(store.clean_up)
        adapters = serve_adapters(served, store)
        trackers = TrackerAccess(config.report_to, config.wandb_key_file)
        model_length = vllm_config.model_config.max_model_len
        linears = base_linears(vllm_config.model_config.hf_text_config)
        state.finetuning = FinetuningService(
            store=store,
            load_tokenizer=lambda: _tokenizer(engine_client, args),
            base_models=tuple(base.name for base in served.base_model_paths),
            max_lora_rank=config.max_lora_rank,
            max_seq_length=_longest_sequence(model_length, config),
            fetch_iterations=_iterations_of(engine_client),
            find_adapter=_paths_of(adapters),
            num_layers=linears.num_layers,
            target_modules=tuple(linears.linears),
            limits=Limits.from_config(config),
            trackers=trackers,
        )
        # The router in files.py runs it as long as the application lives.
        state.finetuning_housekeeping = Housekeeping(store)
        # The router in webhooks.py runs it likewise.
        state.finetuning_webhooks = WebhookSender(store, config.webhook_allow_private)
        # The router in fine_tuning.py runs it likewise.
        state.finetuning_tracking = Tracking(store, trackers)
        # The router in adapter_routes.py runs its tasks likewise.
        state.finetuning_adapters = _adapter_service(
            engine_client, store, state.finetuning.base_models, config
        )
        if getattr(engine_client, "log_stats", True):  # --disable-log-stats is for us too
            state.finetuning_metrics = await asyncio.to_thread(
                _metrics_of, engine_client, store, state.finetuning.base_models
            )
        logger.info("finetuning API ready, files and jobs in %s", config.dir)


def _adapter_service(
    engine_client: Any, store: JobStore, base_models: tuple[str, ...], config: FinetuningConfig
) -> AdapterService:
    base = base_linears(engine_client.vllm_config.model_config.hf_text_config)

    async def in_use() -> list[set[int]]:
        call = engine_client.engine_core.call_utility_all_async
        return [set(ids) for ids in await call("finetuning_adapters_in_use")]

    async def unload(int_id: int) -> bool:
        return bool(await engine_client.remove_lora(int_id))

    return AdapterService(
        store=store,
        base_models=base_models,
        base=base,
        max_lora_rank=config.max_lora_rank,
        limits=Limits.from_config(config),
        remover=AdapterRemover(store, in_use, unload),
        merger=Merger(store, base_models, base, config.max_lora_rank),
    )


def _tokenizer(engine_client: Any, args: Namespace) -> ExampleTokenizer:
    """A tokenizer of our own: a fast tokenizer that two threads use at once fails ("Already
    borrowed"), and vLLM's must not fail because of us."""
    return ExampleTokenizer(
        copy.deepcopy(engine_client.renderer.get_tokenizer()),
        load_chat_template(args.chat_template),
        resolve_default_chat_template_kwargs(args),
    )


def _iterations_of(engine_client: Any) -> Any:
    async def fetch(last: int) -> list[dict[str, Any]]:
        call = engine_client.engine_core.call_utility_all_async
        records = [
            {"engine": index, **record}
            for index, of_engine in enumerate(await call("finetuning_iterations", last))
            for record in of_engine
        ]
        return sorted(records, key=lambda record: record["start_time"])[-last:]

    return fetch


def _metrics_of(
    engine_client: Any, store: JobStore, base_models: tuple[str, ...]
) -> FinetuningMetrics:
    database = Database(store.root / "store.db")

    async def fetch() -> list[dict[str, Any]]:
        stats = await engine_client.engine_core.call_utility_all_async("finetuning_stats")
        return list(stats)

    return FinetuningMetrics(
        base_models[0],  # vLLM's own metrics have the first served name too
        fetch,
        lambda: count_queued_jobs(database, base_models),
    )


def _paths_of(adapters: ServedAdapters) -> Any:
    def find(name: str) -> str | None:
        lora = adapters.get(name)  # one look: it may be deleted between two
        return None if lora is None else str(lora.lora_path)

    return find


def _longest_sequence(model_length: int, config: FinetuningConfig) -> int:
    """What is known of it here; a cache given in bytes is known to the worker only, and a job that
    does not fit into it fails when it starts."""
    if config.activation_cache_bytes is not None:
        return model_length
    return min(model_length, config.activation_cache_tokens)
