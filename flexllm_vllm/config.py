"""The finetuning configuration: built once from the flags, validated, passed down."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

# The key in ``VllmConfig.additional_config`` under which the configuration travels to the engine
# and worker processes.
KEY = "finetuning"

ACTIVATION_POLICIES = ("store", "balanced", "minimal")
ACTIVATION_DTYPES = ("auto", "bfloat16", "int8")
TRACKERS = ("wandb", "mlflow")
ATTENTION_BACKENDS = ("native", "xformers")
BASE_WEIGHTS = ("auto", "one-copy", "two-copies")


def default_dir() -> Path:
    """Below the user's state folder, as the XDG base directory specification has it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "flexllm-vllm"


@dataclass(frozen=True)
class FinetuningConfig:
    """What the ``--finetuning-*`` flags say.

    Attributes:
        dir: files, jobs and adapters.
        max_jobs: jobs that train at once; more are queued.
        max_lora_rank: largest ``r`` a job may ask for.
        max_tokens: finetuning tokens an iteration may hold.
        activation_cache_tokens: tokens whose activations the worker can keep, for adapters on all
            linear layers; also the longest sequence that they can train.
        activation_cache_bytes: the same, as a size; takes the place of the tokens.
        activation_policy: what is kept of a token's forward, the rest is computed again.
        activation_dtype: how it is kept: ``"auto"`` exactly, the others compressed.
        base_weights: ``"one-copy"``, ``"two-copies"``, or ``"auto"``: by the size of the layer
            (``patches/cpu_linear_weights.py``).
        attention_backend: whose kernels run the backward of attention on a GPU: ours or xformers'.
        tpot_slo_ms: latency target of an iteration that holds inference; None: a multiple of what
            it takes without finetuning (``scheduler/budget.py``).
        checkpoint_interval_s: seconds from one checkpoint of a running job to the next.
        ttft_slo_ms: target of the time to first token; half of it bounds iterations that hold no
            inference, since a request that arrives waits for their end. None: a multiple of the
            target of the others.
        keys_file: the keys of the tenants (``api/keys.py``); None: there is one tenant.
        max_file_bytes: size of an uploaded file.
        max_files: uploaded files, together with uploads that are not complete.
        max_disk_bytes: size of ``dir``; None: as much as the disk holds, less a reserve.
        max_queued_jobs: jobs that wait for their start.
        max_examples: examples in a file.
        webhook_allow_private: webhooks may go to private addresses, and over http.
        report_to: trackers beside TensorBoard that every job has.
        wandb_key_file: holds the key for Weights & Biases; None: the environment does.
    """

    dir: Path = field(default_factory=default_dir)
    max_jobs: int = 1
    max_lora_rank: int = 64
    max_tokens: int = 256
    activation_cache_tokens: int = 8192
    activation_cache_bytes: int | None = None
    activation_policy: str = "balanced"
    activation_dtype: str = "auto"
    base_weights: str = "auto"
    attention_backend: str = "native"
    tpot_slo_ms: float | None = None
    ttft_slo_ms: float | None = None
    checkpoint_interval_s: float = 60.0
    keys_file: Path | None = None
    max_file_bytes: int = 512 << 20
    max_files: int = 10_000
    max_disk_bytes: int | None = None
    max_queued_jobs: int = 100
    max_examples: int = 1_000_000
    webhook_allow_private: bool = False
    report_to: tuple[Literal["wandb", "mlflow"], ...] = ()
    wandb_key_file: Path | None = None

    # Rows of the worker's batch beyond the user's --max-num-seqs: finetuning sequences that can
    # have a window in one iteration. A row costs some hundred bytes.
    max_rows = 16

    def __post_init__(self) -> None:
        from vllm.config.lora import MaxLoRARanks

        for flag, value, least in (
            ("--finetuning-max-jobs", self.max_jobs, 1),
            ("--finetuning-max-tokens", self.max_tokens, 16),
            ("--finetuning-activation-cache-tokens", self.activation_cache_tokens, 64),
            ("--finetuning-activation-cache-bytes", self.activation_cache_bytes, 1 << 20),
            ("--finetuning-max-file-bytes", self.max_file_bytes, 1),
            ("--finetuning-max-files", self.max_files, 1),
            ("--finetuning-max-disk-bytes", self.max_disk_bytes, 1 << 20),
            ("--finetuning-max-queued-jobs", self.max_queued_jobs, 1),
            ("--finetuning-max-examples", self.max_examples, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{flag} is {value}, must be at least {least}")
        for flag, choice, choices in (
            ("--finetuning-activation-policy", self.activation_policy, ACTIVATION_POLICIES),
            ("--finetuning-activation-dtype", self.activation_dtype, ACTIVATION_DTYPES),
            ("--finetuning-base-weights", self.base_weights, BASE_WEIGHTS),
            ("--finetuning-attention-backend", self.attention_backend, ATTENTION_BACKENDS),
        ):
            if choice not in choices:
                raise ValueError(f"{flag} is {choice}, must be one of {', '.join(choices)}")
        ranks = get_args(MaxLoRARanks)
        if self.max_lora_rank not in ranks:
            raise ValueError(
                f"--finetuning-max-lora-rank is {self.max_lora_rank}, vLLM allows "
                f"{', '.join(map(str, ranks))}"
            )
        for flag, target in (
            ("--finetuning-tpot-slo-ms", self.tpot_slo_ms),
            ("--finetuning-ttft-slo-ms", self.ttft_slo_ms),
            ("--finetuning-checkpoint-interval-s", self.checkpoint_interval_s),
        ):
            if target is not None and not target > 0:
                raise ValueError(f"{flag} is {target}, must be above 0")

    @property
    def training_slots(self) -> int:
        """LoRA slots of the worker beyond the user's ``--max-loras``."""
        return self.max_jobs

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = asdict(self)
        values["report_to"] = list(self.report_to)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuningConfig":
        paths = {
            name: Path(values[name])
            for name in ("dir", "keys_file", "wandb_key_file")
            if values.get(name)
        }
        report_to = tuple(values.get("report_to") or ())
        return cls(**{**values, **paths, "report_to": report_to})

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "FinetuningConfig | None":
        """What travels in a ``VllmConfig``; None for a server that does not finetune."""
        additional = vllm_config.additional_config
        values = additional.get(KEY) if isinstance(additional, dict) else None
        return None if values is None else cls.from_dict(values)
