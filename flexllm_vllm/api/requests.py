"""What users may send, checked field by field; nothing unknown is passed over in silence."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)

from flexllm_vllm.api.integrations import Integration
from flexllm_vllm.api.request_body import RequestBody
from flexllm_vllm.jobs.names import check_suffix
from flexllm_vllm.jobs.types import ALL_TARGET_MODULES


def _auto_int(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000:
        return value
    raise ValueError(f"must be 'auto' or a positive integer, got {str(value)[:40]!r}")


def _auto_float(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= 1e6:
        return float(value)
    raise ValueError(f"must be 'auto' or a positive number, got {str(value)[:40]!r}")


def _method_type(value: Any) -> Any:
    if value not in ("supervised", "dpo"):
        raise ValueError(
            f"only the methods 'supervised' and 'dpo' are supported, got {str(value)[:40]!r}"
        )
    return value


def _safe_suffix(value: str | None) -> str | None:
    if value:
        check_suffix(value)
    return value or None


_AutoIntSchema = Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] | None
_AutoFloatSchema = Annotated[float, Field(gt=0, le=1e6)] | Literal["auto"] | None
AutoInt = Annotated[
    int | Literal["auto"] | None, PlainValidator(_auto_int, json_schema_input_type=_AutoIntSchema)
]
AutoFloat = Annotated[
    float | Literal["auto"] | None,
    PlainValidator(_auto_float, json_schema_input_type=_AutoFloatSchema),
]
Suffix = Annotated[str | None, AfterValidator(_safe_suffix)]
Number = Annotated[float, Field(allow_inf_nan=False)]


Steps = Annotated[int, Field(ge=1, le=1_000_000)]


class Hyperparameters(RequestBody):
    """OpenAI's three, and those of ``transformers.TrainingArguments`` beside them."""

    n_epochs: AutoInt = None
    batch_size: AutoInt = None
    learning_rate_multiplier: AutoFloat = None
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    lr_scheduler_type: Literal["constant", "linear", "cosine"] | None = None
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] | None = None
    weight_decay: Annotated[Number, Field(ge=0)] | None = None
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] | None = None
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] | None = None
    adam_epsilon: Annotated[Number, Field(gt=0)] | None = None
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = None
    max_steps: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    max_seq_length: Annotated[int, Field(ge=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    shuffle: bool | None = None
    scheduling_weight: Annotated[Number, Field(gt=0, le=1000)] | None = None
    eval_steps: Steps | None = None
    save_steps: Steps | None = None
    save_total_limit: Annotated[int, Field(ge=1, le=100)] | None = None
    early_stopping_patience: Steps | None = None
    load_best_model_at_end: bool | None = None

    @field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be -1 (no limit) or a positive integer, got 0")
        return value


class Lora(RequestBody):
    """The adapter, in the words of ``peft.LoraConfig``."""

    r: Annotated[int, Field(ge=1)] | None = None
    lora_alpha: Annotated[Number, Field(gt=0)] | None = None
    use_rslora: bool | None = None
    target_modules: list[str] | None = None
    layers_to_transform: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None
    ) = None
    init_from: str | None = None

    @field_validator("target_modules")
    @classmethod
    def _known_modules(cls, value: list[str] | None) -> list[str] | None:
        if value is None:
            return None
        unknown = [name for name in value if name not in ALL_TARGET_MODULES]
        if unknown or not value:
            got = ", ".join(repr(name[:40]) for name in unknown) or "an empty list"
            raise ValueError(f"expected some of {', '.join(ALL_TARGET_MODULES)}; got {got}")
        return value


class Supervised(RequestBody):
    """``method.supervised``."""

    hyperparameters: Hyperparameters | None = None
    lora: Lora | None = None


class DpoHyperparameters(Hyperparameters):
    """Those, and DPO's ``beta``."""

    beta: AutoFloat = None


class Dpo(RequestBody):
    """``method.dpo``."""

    hyperparameters: DpoHyperparameters | None = None
    lora: Lora | None = None


class Method(RequestBody):
    """``method``: its type, and the settings of that type alone."""

    type: Annotated[Literal["supervised", "dpo"], BeforeValidator(_method_type)]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        other = "supervised" if self.type == "dpo" else "dpo"
        if getattr(self, other) is not None:
            raise ValueError(f"the type is '{self.type}', but settings of '{other}' are given")
        return self


class JobCreateRequest(RequestBody):
    """Body of ``POST /v1/fine_tuning/jobs``."""

    model: str
    training_file: str
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Suffix = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: dict[str, str] | None = None
    validation_file: str | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None

    @field_validator("metadata")
    @classmethod
    def _small_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None:
            if len(value) > 16:
                raise ValueError(f"at most 16 pairs, got {len(value)}")
            for name, text in value.items():
                if len(name) > 64 or len(text) > 512:
                    raise ValueError("keys have at most 64 characters, values at most 512")
        return value


class LegacyJobCreateRequest(RequestBody):
    """Body of ``POST /v1/fine_tunes``, the API before ``fine_tuning/jobs``."""

    training_file: str
    model: str | None = None
    n_epochs: AutoInt = None
    batch_size: AutoInt = None
    learning_rate_multiplier: AutoFloat = None
    suffix: Suffix = None
    validation_file: str | None = None
