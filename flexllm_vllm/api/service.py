"""What the routes do, without HTTP: the rules of the service over store and tokenizer."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flexllm_vllm.api.errors import ApiError, invalid
from flexllm_vllm.api.file_service import FileService
from flexllm_vllm.api.hyperparameters import requested, resolve_training
from flexllm_vllm.api.idempotency import create_once
from flexllm_vllm.api.integrations import integration_objects
from flexllm_vllm.api.job_data import JobData, file_not_found, report_events
from flexllm_vllm.api.limits import Limits
from flexllm_vllm.api.lora import resolve_lora
from flexllm_vllm.api.requests import (
    Dpo,
    DpoHyperparameters,
    Hyperparameters,
    JobCreateRequest,
    Lora,
    Supervised,
)
from flexllm_vllm.api.tenants import LOCAL, Tenant
from flexllm_vllm.api.tracker_access import TrackerAccess
from flexllm_vllm.api.watch import StoreWatch
from flexllm_vllm.data.order import num_steps
from flexllm_vllm.data.tokenize import ExampleTokenizer, TokenizationReport
from flexllm_vllm.jobs.errors import FileNotStoredError
from flexllm_vllm.jobs.event_types import NewEvent
from flexllm_vllm.jobs.idempotency import IdempotencyClaim
from flexllm_vllm.jobs.names import adapter_name
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import (
    DATASET_FILE,
    TARGET_MODULES,
    VALIDATION_FILE,
    FinetuningJob,
    Method,
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
        fetch_iterations: the engines' records of their last iterations.
        num_layers: decoder layers of the base model.
        limits: how much this server takes in.
        trackers: where metrics can be sent.
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
    trackers: TrackerAccess = field(default_factory=TrackerAccess)

    @cached_property
    def _data(self) -> JobData:
        return JobData(self.store, lambda: self.load_tokenizer())

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
        model, continued = self._base_of(request.model, tenant)
        wanted, where = _hyperparameters(request)
        lora, init_adapter_path = resolve_lora(
            _lora(request, continued),
            self.max_lora_rank,
            self.target_modules,
            self.num_layers,
            self.find_adapter,
            f"method.{_method(request)}.lora",
        )
        method = _method(request)
        max_seq_length = self._max_seq_length(wanted, method, where)
        trackers = self.trackers.trackers(request.integrations)
        job_id, folder = self.store.new_job()
        try:
            report, events = self._tokenize(request, tenant, folder, max_seq_length)
            training = resolve_training(
                wanted,
                request.seed,
                report.num_examples,
                max_seq_length,
                where,
                method,
                has_validation=request.validation_file is not None,
            )
            training = _within_weight(training, wanted, tenant, where)
            return self.store.create_job(
                NewJob(
                    id=job_id,
                    model=model,
                    adapter_name=adapter_name(
                        model, tenant.organization_id, request.suffix, job_id
                    ),
                    training_file=request.training_file,
                    validation_file=request.validation_file,
                    method=method,
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
                    events=(NewEvent(f"Created fine-tuning job: {job_id}"), *events),
                    integrations=integration_objects(request.integrations),
                    trackers=trackers,
                ),
                tenant.quotas,
                claim,
                max_queued=self.limits.max_queued_jobs,
            )
        except FileNotStoredError as error:  # deleted while it was tokenized
            self.store.discard_new_job(job_id)
            is_training = error.file_id == request.training_file
            param = "training_file" if is_training else "validation_file"
            raise file_not_found(error, param) from None
        except BaseException:
            self.store.discard_new_job(job_id)
            raise

    def _max_seq_length(self, wanted: Hyperparameters, method: Method, where: str) -> int:
        """Of one example. The two of a pair are kept at once."""
        most = self.max_seq_length // 2 if method == "dpo" else self.max_seq_length
        asked = wanted.max_seq_length or most
        if asked > most:
            raise invalid(
                f"max_seq_length {asked} is above this server's maximum of {most} tokens",
                f"{where}.max_seq_length",
            )
        return asked

    def _tokenize(
        self, request: JobCreateRequest, tenant: Tenant, folder: Path, max_seq_length: int
    ) -> tuple[TokenizationReport, list[NewEvent]]:
        """Writes the data sets of a job; what is told of its training file, and the events."""
        method, organization = _method(request), tenant.organization_id
        path = self._data.path(request.training_file, "training_file", organization)
        valid = request.validation_file
        valid_path = self._data.path(valid, "validation_file", organization) if valid else None
        self.files.check_job(path)
        report = self._data.tokenize(
            path, folder / DATASET_FILE, method, max_seq_length, "training_file"
        )
        events = report_events("training", request.training_file, report, max_seq_length)
        if valid is not None and valid_path is not None:
            checked = self._data.tokenize(
                valid_path, folder / VALIDATION_FILE, method, max_seq_length, "validation_file"
            )
            events += report_events("validation", valid, checked, max_seq_length)
        events.append(
            NewEvent(
                f"Files validated: {report.num_examples} examples, {report.num_tokens} tokens, "
                f"{report.num_loss_tokens} of them to learn; the job is queued"
            )
        )
        return report, events

    async def iterations(self, last: int) -> list[dict[str, Any]]:
        """Records of the engines' last iterations, oldest first.

        Raises:
            ApiError: the engine does not answer.
        """
        try:
            return await self.fetch_iterations(last)
        except Exception as error:
            logger.exception("the engine did not report its iterations")
            raise ApiError(503, "The engine did not report its iterations.") from error

    def _base_of(self, model: str, tenant: Tenant) -> tuple[str, str | None]:
        """The base model to train on, and the adapter to continue from where one is named."""
        if model in self.base_models:
            return model, None
        adapter = self.store.adapters.get(model, tenant.organization_id)
        if adapter is not None and adapter.base_model in self.base_models:
            return adapter.base_model, model
        message = f"The model '{model[:200]}' does not exist; served: {', '.join(self.base_models)}"
        raise ApiError(404, message, "model", "model_not_found")


def _method(request: JobCreateRequest) -> Method:
    return request.method.type if request.method else "supervised"


def _settings(request: JobCreateRequest) -> Supervised | Dpo | None:
    """What the request says of its method."""
    if request.method is None:
        return None
    return request.method.supervised or request.method.dpo


def _lora(request: JobCreateRequest, continued: str | None) -> Lora:
    settings = _settings(request)
    wanted = (settings and settings.lora) or Lora()
    if continued is None:
        return wanted
    if wanted.init_from not in (None, continued):
        raise invalid(
            f"The model is the adapter '{continued}', and init_from names another one; give one",
            f"method.{_method(request)}.lora.init_from",
        )
    return wanted.model_copy(update={"init_from": continued})


def _hyperparameters(request: JobCreateRequest) -> tuple[Hyperparameters, str]:
    """The hyperparameters, and the path at which the request gave them."""
    method, settings = _method(request), _settings(request)
    given = settings.hyperparameters if settings else None
    if given:
        top = request.hyperparameters
        if top and {**requested(given), **requested(top)} != requested(given):
            raise invalid(
                "hyperparameters are given twice and differ; give them under "
                f"method.{method}.hyperparameters only",
                "hyperparameters",
            )
        return given, f"method.{method}.hyperparameters"
    if request.hyperparameters:
        return request.hyperparameters, "hyperparameters"
    return (DpoHyperparameters() if method == "dpo" else Hyperparameters()), "hyperparameters"


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
