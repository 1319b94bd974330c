"""The finetuning configuration: built once from the flags, validated, passed down."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

# The key in ``VllmConfig.additional_config`` under which the configuration travels to the engine
# and worker processes.
KEY = "finetuning"


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
        activation_cache_tokens: tokens whose activations the worker can keep; also the longest
            sequence that can be trained.
        tpot_slo_ms: latency target of an iteration while inference is present; None: finetuning
            takes a fixed small number of tokens then.
    """

    dir: Path = field(default_factory=default_dir)
    max_jobs: int = 1
    max_lora_rank: int = 64
    max_tokens: int = 256
    activation_cache_tokens: int = 4096
    tpot_slo_ms: float | None = None

    # Rows of the worker's batch beyond the user's --max-num-seqs: finetuning sequences that can
    # have a window in one iteration. A row costs some hundred bytes.
    max_rows = 16

    def __post_init__(self) -> None:
        from vllm.config.lora import MaxLoRARanks

        for flag, value, least in (
            ("--finetuning-max-jobs", self.max_jobs, 1),
            ("--finetuning-max-tokens", self.max_tokens, 16),
            ("--finetuning-activation-cache-tokens", self.activation_cache_tokens, 64),
        ):
            if value < least:
                raise ValueError(f"{flag} is {value}, must be at least {least}")
        ranks = get_args(MaxLoRARanks)
        if self.max_lora_rank not in ranks:
            raise ValueError(
                f"--finetuning-max-lora-rank is {self.max_lora_rank}, vLLM allows "
                f"{', '.join(map(str, ranks))}"
            )
        if self.tpot_slo_ms is not None and not self.tpot_slo_ms > 0:
            raise ValueError(f"--finetuning-tpot-slo-ms is {self.tpot_slo_ms}, must be above 0")

    @property
    def training_slots(self) -> int:
        """LoRA slots of the worker beyond the user's ``--max-loras``."""
        return self.max_jobs

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "dir": str(self.dir)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuningConfig":
        return cls(**{**values, "dir": Path(values["dir"])})

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "FinetuningConfig | None":
        """What travels in a ``VllmConfig``; None for a server that does not finetune."""
        additional = vllm_config.additional_config
        values = additional.get(KEY) if isinstance(additional, dict) else None
        return None if values is None else cls.from_dict(values)
