"""From requested hyperparameters to resolved ones: defaults and what "auto" means."""

import secrets
from typing import Any

from flexllm_vllm.api.errors import invalid
from flexllm_vllm.api.requests import Hyperparameters
from flexllm_vllm.jobs.types import Method, TrainingSpec

DEFAULT_N_EPOCHS = 3
DEFAULT_LEARNING_RATE = 2e-4  # usual for LoRA; what learning_rate_multiplier multiplies
DEFAULT_DPO_LEARNING_RATE = 1e-5
DEFAULT_BETA = 0.1
MAX_AUTO_BATCH_SIZE = 16

_OPENAI = ("n_epochs", "batch_size", "learning_rate_multiplier")
_SAME_NAME = (
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "shuffle",
    "scheduling_weight",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "early_stopping_patience",
    "load_best_model_at_end",
)


def auto_batch_size(num_examples: int) -> int:
    """``batch_size: "auto"``: an epoch has about 32 steps, a step 1 to 16 examples."""
    return max(1, min(MAX_AUTO_BATCH_SIZE, num_examples // 32))


def requested(wanted: Hyperparameters) -> dict[str, Any]:
    """OpenAI's three hyperparameters as given, "auto" where they were not."""
    given = wanted.model_dump()
    names = (*_OPENAI, "beta") if "beta" in given else _OPENAI
    return {name: "auto" if given[name] is None else given[name] for name in names}


def resolve_training(
    wanted: Hyperparameters,
    seed: int | None,
    num_examples: int,
    max_seq_length: int,
    where: str,
    method: Method = "supervised",
    has_validation: bool = False,
) -> TrainingSpec:
    """All values that training needs.

    Args:
        seed: the job's own ``seed``; may also stand among the hyperparameters.
        where: path of the hyperparameters in the request, for errors.

    Raises:
        ApiError: values that contradict each other.
    """
    multiplier = _number(wanted.learning_rate_multiplier)
    if wanted.learning_rate is not None and multiplier is not None:
        message = "give learning_rate or learning_rate_multiplier, not both"
        raise invalid(message, f"{where}.learning_rate")
    if seed is not None and wanted.seed is not None and seed != wanted.seed:
        raise invalid(f"seed is given twice and differs: {seed} and {wanted.seed}", "seed")
    if seed is None:
        seed = wanted.seed
    n_epochs = _number(wanted.n_epochs)
    batch_size = _number(wanted.batch_size)
    for name in ("eval_steps", "early_stopping_patience", "load_best_model_at_end"):
        if getattr(wanted, name) and not has_validation:
            raise invalid(f"{name} needs a validation_file", f"{where}.{name}")
    default_rate = DEFAULT_DPO_LEARNING_RATE if method == "dpo" else DEFAULT_LEARNING_RATE
    given = wanted.model_dump(include=set(_SAME_NAME), exclude_none=True)
    return TrainingSpec(
        batch_size=auto_batch_size(num_examples) if batch_size is None else int(batch_size),
        max_seq_length=max_seq_length,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        n_epochs=DEFAULT_N_EPOCHS if n_epochs is None else int(n_epochs),
        learning_rate=wanted.learning_rate or default_rate * (multiplier or 1.0),
        learning_rate_multiplier=multiplier,
        beta=_number(getattr(wanted, "beta", None)) or DEFAULT_BETA,
        **given,
    )


def _number(value: Any) -> float | None:
    return None if value is None or value == "auto" else value
