"""The form of our answers, for ``/openapi.json``.

The routes answer with what ``responses.py`` builds; a test compares the two. Fields beyond these
may come at any time, as at OpenAI.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from flexllm_vllm.api.pages import Listed, Page, example, page_example

_FILE: dict[str, Any] = {
    "id": "file-b3TqXkA9fQmZ1LxV7cRdW2sN",
    "object": "file",
    "bytes": 52431,
    "created_at": 1767225600,
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
}
_HYPERPARAMETERS: dict[str, Any] = {
    "n_epochs": 3,
    "batch_size": "auto",
    "learning_rate_multiplier": "auto",
}
_JOB: dict[str, Any] = {
    "id": "ftjob-Zk3vTq8LmB1xW6cRdY2sNa9f",
    "object": "fine_tuning.job",
    "created_at": 1767225700,
    "error": None,
    "estimated_finish": None,
    "fine_tuned_model": "ft:demo:local:orders:Zk3vTq8L",
    "finished_at": 1767226300,
    "hyperparameters": _HYPERPARAMETERS,
    "integrations": [],
    "metadata": {"team": "search"},
    "method": {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {**_HYPERPARAMETERS, "learning_rate": 0.0002},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        },
    },
    "model": "demo",
    "organization_id": "local",
    "result_files": [],
    "seed": 42,
    "status": "succeeded",
    "trained_tokens": 17255,
    "training_file": _FILE["id"],
    "user_provided_suffix": "orders",
    "validation_file": None,
}
_EVENT: dict[str, Any] = {
    "id": "ftevent-c9VxWq3TbZ8mLk1RdY6sNa2f",
    "object": "fine_tuning.job.event",
    "created_at": 1767225800,
    "level": "info",
    "message": "Step 7/30: training loss=1.2500",
    "type": "metrics",
    "data": {"step": 7, "total_steps": 30, "train_loss": 1.25},
}
_CHECKPOINT: dict[str, Any] = {
    "id": "ftckpt-Rd8LmZk3vTq1xW6cY2sNa9fB",
    "object": "fine_tuning.job.checkpoint",
    "created_at": 1767226000,
    "fine_tuned_model_checkpoint": "ft:demo:local:orders:Zk3vTq8L:ckpt-step-10",
    "fine_tuning_job_id": _JOB["id"],
    "metrics": {"step": 10, "train_loss": 0.75},
    "step_number": 10,
}


def left_out() -> Any:
    """A field that is missing where it has no value."""
    return Field(default_factory=lambda: None)


class OpenAIErrorDetail(BaseModel):
    """``type`` is OpenAI's class of errors; ``param`` a path into the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """Any answer that is not a success."""

    error: OpenAIErrorDetail


class FileObject(Listed):
    """An uploaded file. Times are Unix seconds; ``expires_at`` is missing where there is none."""

    model_config = example(_FILE)

    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int = left_out()
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]


class FilePage(Page[FileObject]):
    """Files, and whether there are more after ``last_id``; the ids of an empty list are empty."""

    model_config = page_example(_FILE)

    first_id: str
    last_id: str


class FileDeleted(BaseModel):
    """A file that is no more."""

    model_config = example({"id": _FILE["id"], "object": "file", "deleted": True})

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class FineTuningJobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class FineTuningHyperparameters(BaseModel):
    """OpenAI's three, as they were requested."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"] | None
    learning_rate_multiplier: float | Literal["auto"] | None


class FineTuningMethod(BaseModel):
    """The method, and beside ``type`` what was resolved for it, under its name."""

    type: str


class FineTuningJob(Listed):
    """A job. Times are Unix seconds; ``fine_tuned_model`` and ``trained_tokens`` come with its
    end."""

    model_config = example(_JOB)

    object: Literal["fine_tuning.job"]
    created_at: int
    error: FineTuningJobError | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: FineTuningHyperparameters
    integrations: list[dict[str, Any]] | None
    metadata: dict[str, str] | None
    method: FineTuningMethod
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Literal[
        "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
    ]
    trained_tokens: int | None
    training_file: str
    user_provided_suffix: str | None
    validation_file: str | None


class FineTuningJobPage(Page[FineTuningJob]):
    """Jobs, and whether there are more after ``last_id``."""

    model_config = page_example(_JOB)


class FineTuningJobEvent(Listed):
    """A message, or the metrics of an optimizer step."""

    model_config = example(_EVENT)

    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningJobEventPage(Page[FineTuningJobEvent]):
    """Events, and whether there are more after ``last_id``."""

    model_config = page_example(_EVENT)


class FineTuningJobCheckpoint(Listed):
    """A checkpoint that can be named as a model."""

    model_config = example(_CHECKPOINT)

    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class FineTuningJobCheckpointPage(Page[FineTuningJobCheckpoint]):
    """Checkpoints, and whether there are more after ``last_id``."""

    model_config = page_example(_CHECKPOINT)


class FineTuneEvent(BaseModel):
    """An event in the legacy form."""

    object: Literal["fine-tune-event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str


class FineTuneHyperparams(BaseModel):
    """Hyperparameters in the legacy form."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float | None
    prompt_loss_weight: float


class FineTune(BaseModel):
    """A job in the legacy form; ``events`` is missing in lists."""

    id: str
    object: Literal["fine-tune"]
    model: str
    created_at: int
    fine_tuned_model: str | None
    hyperparams: FineTuneHyperparams
    organization_id: str
    result_files: list[FileObject]
    status: Literal["pending", "running", "paused", "succeeded", "failed", "cancelled"]
    training_files: list[FileObject]
    validation_files: list[FileObject]
    updated_at: int
    events: list[FineTuneEvent] = left_out()


class FineTuneList(BaseModel):
    """All jobs in the legacy form, oldest first."""

    object: Literal["list"]
    data: list[FineTune]


class FineTuneEventList(BaseModel):
    """All events of a job in the legacy form, oldest first."""

    object: Literal["list"]
    data: list[FineTuneEvent]


class FinetuningIteration(BaseModel):
    """One engine iteration: what it held, and how long it took. ``start_time`` is Unix time in
    seconds; ``finetuning_backward_tokens`` are token-layers, ``finetuning_loss_tokens`` have run
    through the loss head; ``engine`` counts the engines of ``--data-parallel-size``."""

    engine: int
    start_time: float
    duration_ms: float
    target_ms: float | None
    predicted_ms: float
    decode_tokens: int
    prefill_tokens: int
    finetuning_forward_tokens: int
    finetuning_backward_tokens: int
    finetuning_loss_tokens: int


class FinetuningIterations(BaseModel):
    """The last iterations of the engines, oldest first."""

    object: Literal["list"]
    data: list[FinetuningIteration]


def answers(model: type[BaseModel], description: str = "Success") -> dict[int | str, Any]:
    """For a route's ``responses``: its object."""
    return {200: {"model": model, "description": description}}


def answers_or_streams(model: type[BaseModel]) -> dict[int | str, Any]:
    """The same for a route that can stream instead."""
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    described = answers(model, "The events; with `stream=true` as server-sent events.")
    described[200]["content"] = stream
    return described


def _error(message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return {"value": {"error": error}}


# For the ``responses`` of a router: what any of its routes may answer.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": OpenAIError,
        "description": "The request is refused: 400 wrong, 401 without a valid key, 403 not "
        "allowed to this key, 404 unknown, 409 in conflict, 413 too large, 429 beyond a quota. A "
        "409 or 429 that lasts carries `x-should-retry: false`, one that passes `Retry-After`.",
        "content": {
            "application/json": {
                "examples": {
                    "400": _error("Missing required parameter: you must provide 'model'", "model"),
                    "401": _error("Incorrect API key provided.", code="invalid_api_key"),
                    "404": _error("Could not find fine tune: ftjob-none", "fine_tune_id"),
                    "409": _error("File file-a is in use by ftjob-b", "file_id", "file_in_use"),
                }
            }
        },
    },
    "5XX": {
        "model": OpenAIError,
        "description": "The server failed, or its engine does not answer.",
    },
}
