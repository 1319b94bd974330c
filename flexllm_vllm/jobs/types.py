"""The nouns of jobs: their states, settings and checkpoints. Plain data, as in ``*_types.py``."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from flexllm_vllm.jobs.event_types import NewEvent
from flexllm_vllm.jobs.tracker_types import TrackerSpec

# The linear layers that an adapter may cover, in the order in which they are always listed. Of a
# model of the Llama kind:
TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
# ... and of any model: Phi-3 has some of them in one.
ALL_TARGET_MODULES = (*TARGET_MODULES, "qkv_proj", "gate_up_proj")


# The tokenized examples in a job's folder.
DATASET_FILE = "dataset.safetensors"
VALIDATION_FILE = "validation.safetensors"

Method = Literal["supervised", "dpo"]


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

    ``target_modules`` is a subset of :data:`ALL_TARGET_MODULES`, in its order;
    ``layers_to_transform`` are decoder layers, in order, None for all. ``init_from`` names a served
    adapter to continue from.
    """

    r: int = 16
    lora_alpha: float = 32
    use_rslora: bool = False
    target_modules: tuple[str, ...] = TARGET_MODULES
    layers_to_transform: tuple[int, ...] | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        wanted = set(self.target_modules)
        if not wanted or not wanted <= set(ALL_TARGET_MODULES):
            raise ValueError(f"target_modules must be some of {ALL_TARGET_MODULES}, got {wanted}")
        canonical = tuple(name for name in ALL_TARGET_MODULES if name in wanted)
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
class Checkpoint:
    """A checkpoint of a job that is served. ``metrics`` are OpenAI's (``train_loss``, ...)."""

    id: str
    job_id: str
    step: int
    name: str
    metrics: dict[str, Any]
    created_at: int
