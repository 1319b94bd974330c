"""``integrations`` of a job: the trackers that it asks for. OpenAI's W&B, and MLflow likewise."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from flexllm_vllm.api.request_body import RequestBody

_Name = Annotated[str, Field(min_length=1, max_length=128)]
_TagName = Annotated[str, Field(max_length=250, pattern=r"^[A-Za-z0-9_ .:/-]+$")]
_Tag = Annotated[str, Field(min_length=1, max_length=64)]


class WandbIntegration(RequestBody):
    """``integrations[].wandb``: where in Weights & Biases; the key is the server's."""

    # What W&B itself allows in names of projects and entities.
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f]+$")]
    name: _Name | None = None
    entity: (
        Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")] | None
    ) = None
    tags: Annotated[list[_Tag], Field(max_length=50)] | None = None


class MlflowIntegration(RequestBody):
    """``integrations[].mlflow``, in MLflow's words; the tracking server is this server's."""

    experiment_name: _Name
    run_name: _Name | None = None
    tags: Annotated[dict[_TagName, _Name], Field(max_length=50)] | None = None


def _type(value: Any) -> Any:
    if value not in ("wandb", "mlflow"):
        raise ValueError(f"only 'wandb' and 'mlflow' are supported, got {str(value)[:40]!r}")
    return value


class Integration(RequestBody):
    """A tracker: its type, and under the type's name its settings."""

    type: Annotated[Literal["wandb", "mlflow"], BeforeValidator(_type)]
    wandb: WandbIntegration | None = None
    mlflow: MlflowIntegration | None = None

    @model_validator(mode="after")
    def _own_settings(self) -> Self:
        other = "mlflow" if self.type == "wandb" else "wandb"
        if getattr(self, other) is not None:
            raise ValueError(f"the type is '{self.type}', but settings of '{other}' are given")
        if getattr(self, self.type) is None:
            raise ValueError(f"the settings of the type '{self.type}' are missing")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its type."""
        settings: RequestBody = getattr(self, self.type)
        return settings.model_dump()


def integration_objects(integrations: list[Integration] | None) -> list[dict[str, Any]] | None:
    """As a job has them in answers: without what was not set, since OpenAI's ``tags`` are never
    null."""
    if not integrations:
        return None
    return [
        {
            "type": each.type,
            each.type: {name: value for name, value in each.settings.items() if value is not None},
        }
        for each in integrations
    ]
