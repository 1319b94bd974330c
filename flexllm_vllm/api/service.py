"""What the routes do, without HTTP: the rules of the service over store and tokenizer."""

import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flexllm_vllm.api.errors import ApiError, invalid
from flexllm_vllm.api.file_service import FileService
from flexllm_vllm.api.hyperparameters import requested, resolve_training
from flexllm_vllm.api.idempotency import create_once
from flexllm_vllm.api.limits import Limits
from flexllm_vllm.api.lora import resolve_lora
from flexllm_vllm.api.requests import Hyperparameters, JobCreateRequest, Lora
from flexllm_vllm.api.tenants import LOCAL, Tenant
from flexllm_vllm.api.watch import StoreWatch
from flexllm_vllm.data.order import num_steps
from flexllm_vllm.data.tokenize import (
    ExampleTokenizer,
    TokenizationReport,
    tokenize_file,
)
from flexllm_vllm.jobs.idempotency import IdempotencyClaim
from flexllm_vllm.jobs.names import adapter_name
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import (
    TARGET_MODULES,
    FinetuningJob,
    NewEvent,
    NewJob,
    TrainingSpec,
)
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

FetchIterations = Callable[[int], Awaitable[list[dict[str, Any]]]]


@dataclass
class FinetuningService:
    """Finetuning as one API process offers it.

    Its methods block (disk, tokenizer) unless they are coroutines: call them from a worker thread.

    Attributes:
        load_tokenizer: called once, at the first job, from the thread that creates it.
        base_models: served names of the base model; the first is the default.
        max_seq_length: tokens, the server's maximum for one example.
        find_adapter: folder of an adapter that the server knows by this name, or None.
        fetch_iterations: the engine's records of its last iterations.
        num_layers: decoder layers of the base model.
        limits: how much this server takes in.
    """

    store: JobStore
    load_tokenizer: Callable[[], ExampleTokenizer]
    base_models: tuple[str, ...]
    max_lora_rank: int
    max_seq_length: int
    fetch_iterations: FetchIterations
    find_adapter: Callable[[str], str | None]
    num_layers: int
    target_modules: tuple[str, ...] = TARGET_MODULES
    limits: Limits = field(default_factory=Limits)
    # Fast tokenizers refuse two threads at once ("Already borrowed").
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def _tokenizer(self) -> ExampleTokenizer:
        return self.load_tokenizer()

    @cached_property
    def watch(self) -> StoreWatch:
        """Tells the coroutines of this process that the store has changed."""
        return StoreWatch(self.store)

    @property
    def files(self) -> FileService:
        """The rules of files and uploads."""
        return FileService(self.store, self.limits)

    def create_job(
        self,
        request: JobCreateRequest,
        tenant: Tenant = LOCAL,
        idempotency_key: str | None = None,
    ) -> FinetuningJob:
        """Tokenize the training file and queue a job, once for each idempotency key.

        Raises:
            ApiError, DataError, LookupError: whatever is wrong with the request or its data.
        """

        def fingerprint() -> bytes:
            given = request.model_dump(mode="json", exclude_unset=True)
            return json.dumps(given, sort_keys=True).encode()

        return create_once(
            self.store,
            tenant,
            "jobs",
            idempotency_key,
            fingerprint,
            lambda claim: self._create_job(request, tenant, claim),
            lambda job_id: self.store.get_job(job_id, tenant.organization_id),
        )

    def _create_job(
        self, request: JobCreateRequest, tenant: Tenant, claim: IdempotencyClaim | None
    ) -> FinetuningJob:
        self._check_model(request.model, tenant)
        wanted, where = _hyperparameters(request)
        lora_request = (
            request.method and request.method.supervised and request.method.supervised.lora
        )
        lora, init_adapter_path = resolve_lora(
            lora_request or Lora(),
            self.max_lora_rank,
            self.target_modules,
            self.num_layers,
            self.find_adapter,
        )
        path = self._training_file(request.training_file, tenant)
        self.files.check_job(path)
        max_seq_length = wanted.max_seq_length or self.max_seq_length
        if max_seq_length > self.max_seq_length:
            raise invalid(
                f"max_seq_length {max_seq_length} is above this server's maximum of "
                f"{self.max_seq_length} tokens",
                f"{where}.max_seq_length",
            )
        job_id, folder = self.store.new_job()
        try:
            report = self._tokenize(path, folder, max_seq_length)
            training = resolve_training(
                wanted, request.seed, report.num_examples, max_seq_length, where
            )
            training = _within_weight(training, wanted, tenant, where)
            return self.store.create_job(
                NewJob(
                    id=job_id,
                    model=request.model,
                    adapter_name=adapter_name(
                        request.model, tenant.organization_id, request.suffix, job_id
                    ),
                    training_file=request.training_file,
                    lora=lora,
                    training=training,
                    total_steps=num_steps(
                        report.num_examples,
                        training.batch_size,
                        training.n_epochs,
                        training.max_steps,
                    ),
                    hyperparameters=requested(wanted),
                    suffix=request.suffix,
                    init_adapter_path=init_adapter_path,
                    organization_id=tenant.organization_id,
                    metadata=request.metadata,
                    events=_first_events(job_id, request.training_file, report, max_seq_length),
                ),
                tenant.quotas,
                claim,
                max_queued=self.limits.max_queued_jobs,
            )
        except BaseException:
            self.store.discard_new_job(job_id)
            raise

    async def iterations(self, last: int) -> list[dict[str, Any]]:
        """Records of the engine's last iterations, oldest first.

        Raises:
            ApiError: the engine does not answer.
        """
        try:
            return await self.fetch_iterations(last)
        except Exception as error:
            logger.exception("the engine did not report its iterations")
            raise ApiError(503, "The engine did not report its iterations.") from error

    def _check_model(self, model: str, tenant: Tenant) -> None:
        if model in self.base_models:
            return
        if self.store.adapters.get(model, tenant.organization_id) is not None:
            raise invalid(
                f"The model '{model}' is an adapter: to go on training it, name the base model "
                f"'{self.base_models[0]}' here and the adapter as method.supervised.lora.init_from",
                "model",
            )
        message = f"The model '{model[:200]}' does not exist; served: {', '.join(self.base_models)}"
        raise ApiError(404, message, "model", "model_not_found")

    def _training_file(self, file_id: str, tenant: Tenant) -> Path:
        try:
            return self.store.files.path(file_id, tenant.organization_id)
        except LookupError as error:
            raise ApiError(404, str(error), "training_file", "file_not_found") from None

    def _tokenize(self, path: Path, folder: Path, max_seq_length: int) -> TokenizationReport:
        with self._tokenizing:
            dataset, report = tokenize_file(path, self._tokenizer, max_seq_length)
        dataset.save(folder)
        return report


def _hyperparameters(request: JobCreateRequest) -> tuple[Hyperparameters, str]:
    """The hyperparameters, and the path at which the request gave them."""
    supervised = request.method.supervised if request.method else None
    if supervised and supervised.hyperparameters:
        if request.hyperparameters and requested(request.hyperparameters) != requested(
            supervised.hyperparameters
        ):
            raise invalid(
                "hyperparameters are given twice and differ; give them under "
                "method.supervised.hyperparameters only",
                "hyperparameters",
            )
        return supervised.hyperparameters, "method.supervised.hyperparameters"
    if request.hyperparameters:
        return request.hyperparameters, "hyperparameters"
    return Hyperparameters(), "hyperparameters"


def _within_weight(
    training: TrainingSpec, wanted: Hyperparameters, tenant: Tenant, where: str
) -> TrainingSpec:
    """The share of the machine that the tenant's quota allows."""
    most = tenant.quotas.max_scheduling_weight
    if most is None or training.scheduling_weight <= most:
        return training
    if wanted.scheduling_weight is not None:
        raise invalid(
            f"scheduling_weight {wanted.scheduling_weight} is above your organization's quota "
            f"max_scheduling_weight of {most}",
            f"{where}.scheduling_weight",
        )
    return replace(training, scheduling_weight=most)


def _first_events(
    job_id: str, file_id: str, report: TokenizationReport, max_seq_length: int
) -> tuple[NewEvent, ...]:
    events = [
        NewEvent(f"Created fine-tuning job: {job_id}"),
        NewEvent(f"Validating training file: {file_id}"),
    ]
    if report.num_truncated:
        message = f"{report.num_truncated} examples are truncated to {max_seq_length} tokens"
        data = {"num_truncated": report.num_truncated, "max_seq_length": max_seq_length}
        events.append(NewEvent(message, "warn", data=data))
    if report.num_skipped:
        message = f"{report.num_skipped} examples are skipped: no token to learn remains in them"
        events.append(NewEvent(message, "warn", data={"num_skipped": report.num_skipped}))
    message = (
        f"Files validated: {report.num_examples} examples, {report.num_tokens} tokens, "
        f"{report.num_loss_tokens} of them to learn; the job is queued"
    )
    return (*events, NewEvent(message))
