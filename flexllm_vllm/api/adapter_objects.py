"""What users send about adapters and merges, and what they get."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from flexllm_vllm.api.pages import Listed, Page, example, page_example
from flexllm_vllm.api.request_body import RequestBody
from flexllm_vllm.jobs.adapter_types import (
    AdapterMerge,
    AdapterSource,
    MergeMethod,
    MergeSpec,
    WeightedAdapter,
)
from flexllm_vllm.jobs.names import check_suffix
from flexllm_vllm.jobs.types import JobError

MAX_MERGED = 16
# Methods that leave a part of the values out, and those that choose the rank of the result.
_PRUNING = ("ties", "dare", "magnitude_prune")
_ADAPTER: dict[str, Any] = {
    "id": "ft:demo:local:orders:Zk3vTq8L",
    "object": "finetuning.adapter",
    "created_at": 1767226300,
    "source": "job",
    "job_id": "ftjob-Zk3vTq8LmB1xW6cRdY2sNa9f",
    "base_model": "demo",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["k_proj", "q_proj", "v_proj"],
    "bytes": 1849560,
    "organization_id": "local",
}
_MERGED: list[Any] = [
    {"name": _ADAPTER["id"], "weight": 0.7},
    {"name": "ft:demo:local::aB3dE5gH", "weight": 1},
]
_MERGE: dict[str, Any] = {
    "id": "ftmerge-Qm2ZpV7xWc4RkT9sLd1NbY6a",
    "object": "finetuning.adapter.merge",
    "created_at": 1767226400,
    "finished_at": 1767226410,
    "status": "succeeded",
    "adapters": _MERGED,
    "method": "ties",
    "density": 0.5,
    "svd_rank": None,
    "majority_sign_method": "total",
    "seed": 0,
    "adapter": "ft:demo:local:both:Qm2ZpV7x",
    "error": None,
    "organization_id": "local",
}


class ModelObject(BaseModel):
    """``openai.types.Model``."""

    model_config = example(
        {"id": _ADAPTER["id"], "object": "model", "created": 1767226300, "owned_by": "vllm"}
    )

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelDeleted(BaseModel):
    """``openai.types.ModelDeleted``."""

    model_config = example({"id": _ADAPTER["id"], "object": "model", "deleted": True})

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class AdapterObject(Listed):
    """An adapter that can be named as a model. ``bytes`` is the size of its two files; where they
    cannot be read, what they say is null."""

    model_config = example(_ADAPTER)

    object: Literal["finetuning.adapter"] = "finetuning.adapter"
    created_at: int
    source: AdapterSource
    job_id: str | None
    base_model: str
    r: int | None
    lora_alpha: float | None
    target_modules: list[str] | None
    bytes: int | None
    organization_id: str


class AdapterPage(Page[AdapterObject]):
    """Adapters, newest first, and whether there are more after ``last_id``."""

    model_config = page_example(_ADAPTER)


class AdapterDeleted(BaseModel):
    """An adapter that is no more."""

    model_config = example({"id": _ADAPTER["id"], "object": "finetuning.adapter", "deleted": True})

    id: str
    object: Literal["finetuning.adapter"] = "finetuning.adapter"
    deleted: Literal[True] = True


class MergedAdapter(RequestBody):
    """An adapter of a merge, and what it is multiplied by."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    weight: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 1.0


def _suffix(value: str | None) -> str | None:
    if value:
        check_suffix(value)
    return value or None


class MergeCreateRequest(RequestBody):
    """Body of ``POST /v1/finetuning/adapters/merge``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"adapters": _MERGED, "method": "ties", "density": 0.5, "suffix": "both"},
                {"adapters": _MERGED, "method": "linear"},
            ]
        },
    )

    adapters: Annotated[list[MergedAdapter], Field(min_length=2, max_length=MAX_MERGED)]
    method: MergeMethod
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    svd_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    suffix: Annotated[str | None, AfterValidator(_suffix)] = None

    @model_validator(mode="after")
    def _fits_the_method(self) -> "MergeCreateRequest":
        prunes = self.method.startswith(_PRUNING)
        if prunes and self.density is None:
            raise ValueError(f"density is required by the method '{self.method}'")
        if not prunes and self.density is not None:
            raise ValueError(f"density has no meaning for the method '{self.method}'")
        if self.svd_rank is not None and not self.method.endswith("svd"):
            raise ValueError(f"svd_rank has no meaning for the method '{self.method}'")
        if self.majority_sign_method is not None and "ties" not in self.method:
            raise ValueError(f"majority_sign_method has no meaning for the method '{self.method}'")
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) != len(names):
            raise ValueError("adapters names one adapter twice; give it one weight")
        return self

    def spec(self) -> MergeSpec:
        """As the store keeps it."""
        return MergeSpec(
            adapters=tuple(WeightedAdapter(a.name, a.weight) for a in self.adapters),
            method=self.method,
            density=self.density,
            svd_rank=self.svd_rank,
            majority_sign_method=self.majority_sign_method or "total",
            seed=self.seed,
        )


class MergeErrorObject(BaseModel):
    """Why a merge failed."""

    code: str
    message: str


class MergeObject(Listed):
    """A merge. ``adapter`` is the name of the new adapter, once it is served."""

    model_config = example(_MERGE)

    object: Literal["finetuning.adapter.merge"] = "finetuning.adapter.merge"
    created_at: int
    finished_at: int | None
    status: Literal["queued", "running", "succeeded", "failed"]
    adapters: list[MergedAdapter]
    method: MergeMethod
    density: float | None
    svd_rank: int | None
    majority_sign_method: Literal["total", "frequency"]
    seed: int
    adapter: str | None
    error: MergeErrorObject | None
    organization_id: str


class MergePage(Page[MergeObject]):
    """Merges, newest first, and whether there are more after ``last_id``."""

    model_config = page_example(_MERGE)


def merge_object(merge: AdapterMerge) -> MergeObject:
    """The object of a merge of the store."""
    spec = merge.spec
    return MergeObject(
        id=merge.id,
        created_at=merge.created_at,
        finished_at=merge.finished_at,
        status=merge.status.value,
        adapters=[MergedAdapter(name=a.name, weight=a.weight) for a in spec.adapters],
        method=spec.method,
        density=spec.density,
        svd_rank=spec.svd_rank,
        majority_sign_method=spec.majority_sign_method,
        seed=spec.seed,
        adapter=merge.name if merge.status.value == "succeeded" else None,
        error=_error(merge.error),
        organization_id=merge.organization_id,
    )


def _error(error: JobError | None) -> MergeErrorObject | None:
    return None if error is None else MergeErrorObject(code=error.code, message=error.message)
