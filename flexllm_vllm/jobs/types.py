"""The nouns of finetuning: jobs, their settings, events, files and adapters. Plain data."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

# The linear layers that an adapter may cover, in the order in which they are always listed.
TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)

# vLLM's integer ids of adapters. Below are those that vLLM numbers itself (--lora-modules), from 1;
# an adapter has one id while it is trained and another one when it is served.
FIRST_TRAINING_INT_ID = 1_000_000
FIRST_SERVED_INT_ID = 500_000_000

# The tokenized examples in a job's folder.
DATASET_FILE = "dataset.safetensors"
VALIDATION_FILE = "validation.safetensors"

AdapterSource = Literal["job", "checkpoint", "import", "merge"]
Method = Literal["supervised", "dpo"]
# ``combination_type`` of ``peft.LoraModel.add_weighted_adapter``.
MergeMethod = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]

TrackerKind = Literal["tensorboard", "wandb", "mlflow"]

EventLevel = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


class JobStatus(StrEnum):
    """OpenAI's job states, and ``paused``."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether the job can never change again."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True)
class LoraSpec:
    """The adapter to train, in the words of ``peft.LoraConfig``.

    ``target_modules`` is a subset of :data:`TARGET_MODULES`, in its order; ``layers_to_transform``
    are decoder layers, in order, None for all. ``init_from`` names a served adapter to continue
    from.
    """

    r: int = 16
    lora_alpha: float = 32
    use_rslora: bool = False
    target_modules: tuple[str, ...] = TARGET_MODULES
    layers_to_transform: tuple[int, ...] | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        wanted = set(self.target_modules)
        if not wanted or not wanted <= set(TARGET_MODULES):
            raise ValueError(f"target_modules must be some of {TARGET_MODULES}, got {wanted}")
        canonical = tuple(name for name in TARGET_MODULES if name in wanted)
        object.__setattr__(self, "target_modules", canonical)
        if self.layers_to_transform is not None:
            layers = tuple(sorted(set(self.layers_to_transform)))
            if not layers or layers[0] < 0:
                raise ValueError("layers_to_transform must name layers, counted from 0")
            object.__setattr__(self, "layers_to_transform", layers)


@dataclass(frozen=True)
class TrainingSpec:
    """How to train, in the words of ``transformers.TrainingArguments``; all values resolved.

    Attributes:
        learning_rate: the peak rate that the optimizer sees, ``learning_rate_multiplier`` included.
        learning_rate_multiplier: as requested, for the record; None where it was "auto".
        batch_size: sequences per optimizer step.
        warmup_ratio: share of all steps in which the rate rises from 0.
        max_steps: optimizer steps; -1 leaves the number to ``n_epochs``.
        max_seq_length: tokens; longer examples are truncated.
        seed: of the order of examples and of the adapter's initial weights.
        scheduling_weight: its share of the machine among the jobs that train at once.
        eval_steps: optimizer steps from one evaluation to the next; None: at the end of each epoch.
        save_steps: likewise of checkpoints that are served.
        save_total_limit: checkpoints that are kept; the oldest ones go.
        early_stopping_patience: evaluations without a better loss after which training ends.
        load_best_model_at_end: the result is the checkpoint with the lowest evaluation loss.
        beta: of DPO, how far the policy may leave the reference.
    """

    batch_size: int
    max_seq_length: int
    seed: int
    n_epochs: int = 3
    learning_rate: float = 2e-4
    learning_rate_multiplier: float | None = None
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_steps: int = -1
    shuffle: bool = True
    scheduling_weight: float = 1.0
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 3
    early_stopping_patience: int | None = None
    load_best_model_at_end: bool = False
    beta: float = 0.1


@dataclass(frozen=True)
class JobError:
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class NewEvent:
    """An event that has no id and time yet. Of several with one ``key`` the first is kept."""

    message: str
    level: EventLevel = "info"
    type: EventType = "message"
    data: dict[str, Any] | None = None
    key: str | None = None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job. ``created_at`` is Unix time in seconds."""

    id: str
    created_at: int
    level: EventLevel
    message: str
    type: EventType
    data: dict[str, Any] | None


@dataclass(frozen=True)
class TrackerSpec:
    """Where the metrics of a job shall go. ``settings`` are those of the tracker's ``integrations``
    entry; none of them is a secret."""

    kind: TrackerKind
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobTracker:
    """A tracker of a job, claimed by a process.

    Attributes:
        position: number of the last event that it has.
        attempt: counted from 1, since it was last seen to work.
        claim: by which the process that holds it is known.
    """

    seq: int
    job_id: str
    kind: TrackerKind
    settings: dict[str, Any]
    position: int
    attempt: int
    claim: str


@dataclass(frozen=True)
class NewJob:
    """A job to queue. Its folder, from ``JobStore.new_job``, already holds the tokenized dataset.

    Attributes:
        adapter_name: the name under which the adapter will be served.
        hyperparameters: OpenAI's three, as requested ("auto" included).
        init_adapter_path: PEFT folder of ``lora.init_from``.
    """

    id: str
    model: str
    adapter_name: str
    training_file: str
    lora: LoraSpec
    training: TrainingSpec
    total_steps: int
    hyperparameters: dict[str, Any]
    suffix: str | None = None
    method: Method = "supervised"
    validation_file: str | None = None
    integrations: list[dict[str, Any]] | None = None
    init_adapter_path: str | None = None
    organization_id: str = "local"
    metadata: dict[str, str] | None = None
    events: tuple[NewEvent, ...] = ()
    trackers: tuple[TrackerSpec, ...] = ()


@dataclass(frozen=True)
class FinetuningJob:
    """A job as the store knows it. Times are Unix seconds; see also :class:`NewJob`.

    Attributes:
        adapter_int_id: vLLM's integer id of the adapter while it is trained.
        step: the furthest optimizer step that was done; a run that continues from a checkpoint may
            be behind it.
        first_step: the furthest step when the current run began, at ``started_at``.
        attempts: how often an engine has begun it without coming further than before.
        cancel_requested, pause_requested: what the engine shall do with it.
        folder: holds ``dataset.safetensors``, ``checkpoints/`` and, in the end, ``adapter/``.
    """

    id: str
    model: str
    status: JobStatus
    training_file: str
    suffix: str | None
    lora: LoraSpec
    training: TrainingSpec
    hyperparameters: dict[str, Any]
    created_at: int
    started_at: int | None
    finished_at: int | None
    trained_tokens: int
    step: int
    total_steps: int
    adapter_name: str
    fine_tuned_model: str | None
    adapter_int_id: int
    init_adapter_path: str | None
    folder: Path
    error: JobError | None
    cancel_requested: bool
    attempts: int
    organization_id: str
    metadata: dict[str, str] | None = field(default=None)
    method: Method = "supervised"
    validation_file: str | None = None
    result_file: str | None = None
    integrations: list[dict[str, Any]] | None = None
    pause_requested: bool = False
    first_step: int = 0

    @property
    def dataset_path(self) -> Path:
        """The tokenized examples."""
        return self.folder / DATASET_FILE

    @property
    def validation_path(self) -> Path:
        """The tokenized examples of the validation file."""
        return self.folder / VALIDATION_FILE

    @property
    def checkpoints_path(self) -> Path:
        """Where the checkpoints lie, a folder each."""
        return self.folder / "checkpoints"

    @property
    def tensorboard_path(self) -> Path:
        """Where its TensorBoard files lie."""
        return self.folder / "tensorboard"

    @property
    def adapter_path(self) -> Path:
        """Where the final PEFT folder belongs."""
        return self.folder / "adapter"


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that requests may name as their model. ``path`` is a PEFT folder."""

    name: str
    int_id: int
    path: str
    base_model: str
    created_at: int
    source: AdapterSource = "job"
    job_id: str | None = None
    organization_id: str = "local"


@dataclass(frozen=True)
class DeletedAdapter:
    """An adapter that is not served any more.

    Attributes:
        path: its folder, which may still be needed.
        job_unfinished: whether the job that has written it may go on.
    """

    seq: int
    int_id: int
    path: Path
    job_unfinished: bool


class MergeStatus(StrEnum):
    """States of a merge."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        """Whether the merge can never change again."""
        return self in (MergeStatus.SUCCEEDED, MergeStatus.FAILED)


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter of a merge, and what it is multiplied by."""

    name: str
    weight: float


@dataclass(frozen=True)
class MergeSpec:
    """What to merge and how, in the words of ``peft.LoraModel.add_weighted_adapter``.

    Attributes:
        density: share of the values that pruning methods keep.
        svd_rank: of the result; None: the largest of the adapters.
        seed: of what DARE drops.
    """

    adapters: tuple[WeightedAdapter, ...]
    method: MergeMethod
    density: float | None = None
    svd_rank: int | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"
    seed: int = 0


@dataclass(frozen=True)
class AdapterMerge:
    """A merge of adapters into a new one. Times are Unix seconds.

    Attributes:
        name: of the new adapter.
        claim: of the process that works on it now.
        attempts: how often a process has begun it.
    """

    id: str
    name: str
    base_model: str
    spec: MergeSpec
    status: MergeStatus
    error: JobError | None
    created_at: int
    finished_at: int | None
    attempts: int
    claim: str | None
    organization_id: str = "local"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a job that is served. ``metrics`` are OpenAI's (``train_loss``, ...)."""

    id: str
    job_id: str
    step: int
    name: str
    metrics: dict[str, Any]
    created_at: int


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file. ``bytes`` is its size."""

    id: str
    filename: str
    bytes: int
    purpose: str
    created_at: int
    expires_at: int | None = None
    organization_id: str = "local"


class UploadStatus(StrEnum):
    """OpenAI's states of an upload in parts."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Upload:
    """A file that comes in parts. ``bytes`` is what its parts shall have together.

    Attributes:
        expires_at: Unix seconds, when its parts are removed unless it was completed.
        file_id: the file that its parts have become.
        file_expires_after_s: seconds that this file will exist; None: until it is deleted.
    """

    id: str
    filename: str
    bytes: int
    purpose: str
    mime_type: str
    status: UploadStatus
    created_at: int
    expires_at: int
    file_id: str | None = None
    file_expires_after_s: int | None = None
    organization_id: str = "local"


@dataclass(frozen=True)
class UploadPart:
    """A part of an upload."""

    id: str
    upload_id: str
    bytes: int
    created_at: int


@dataclass(frozen=True)
class WebhookEndpoint:
    """Where the ends of jobs are reported. Times are Unix seconds.

    Attributes:
        secrets: ``whsec_...``, what its deliveries are signed with now; the newest first.
    """

    id: str
    name: str
    url: str
    event_types: tuple[str, ...]
    secrets: tuple[str, ...] = field(repr=False)
    created_at: int
    updated_at: int


@dataclass(frozen=True)
class WebhookDelivery:
    """An event on its way to an endpoint, claimed by one process for one attempt.

    Attributes:
        id: the ``webhook-id``, the same in each attempt.
        body: the event as JSON text, the same in each attempt.
        attempt: counted from 1.
        claim: names this attempt; who reports on it shows it.
    """

    id: str
    endpoint_id: str
    url: str
    secrets: tuple[str, ...] = field(repr=False)
    event_type: str
    body: str
    attempt: int
    claim: str
