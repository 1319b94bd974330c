"""What users send about webhook endpoints, and what they get: OpenAI's objects."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from flexllm_vllm.api.pages import Listed, Page
from flexllm_vllm.api.public_network import MAX_URL_LENGTH
from flexllm_vllm.api.request_body import RequestBody
from flexllm_vllm.jobs.webhook_deliveries import EVENT_TYPES
from flexllm_vllm.jobs.webhook_types import WebhookEndpoint

# The end of a secret that is shown, for a user to tell one from another.
_HINT_LENGTH = 4


def _supported(value: Any) -> Any:
    if value not in EVENT_TYPES:
        raise ValueError(
            f"{str(value)[:80]!r} is no event of this server; it sends {', '.join(EVENT_TYPES)}"
        )
    return value


def _once(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


_EventName = Literal[
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"
]
EventType = Annotated[_EventName, BeforeValidator(_supported)]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=64), AfterValidator(_once)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL_LENGTH)]


class WebhookCreateRequest(RequestBody):
    """Body of ``POST /v1/webhook_endpoints``."""

    event_types: EventTypes
    name: Name
    url: Url


class WebhookUpdateRequest(RequestBody):
    """Body of ``POST /v1/webhook_endpoints/{id}``; what is left out stays."""

    event_types: EventTypes | None = None
    name: Name | None = None
    url: Url | None = None


class WebhookRotateSecretRequest(RequestBody):
    """Body of ``POST /v1/webhook_endpoints/{id}/rotate_secret``."""

    keep_old_secret_active_for_24_hours: bool | None = False


class WebhookTestRequest(RequestBody):
    """Body of ``POST /v1/webhook_endpoints/{id}/test``."""

    event_type: EventType


class WebhookEndpointObject(Listed):
    """``openai.types.webhooks.WebhookEndpoint``."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[_EventName]
    signing_secret_hint: str


class WebhookEndpointWithSecret(WebhookEndpointObject):
    """``openai.types.webhooks.WebhookEndpointWithSecret``: after creation and rotation only."""

    signing_secret: str = Field(repr=False)


class WebhookEndpointList(Page[WebhookEndpointObject]):
    """``openai.types.webhooks.WebhookEndpointList``."""


class DeletedWebhookEndpoint(BaseModel):
    """``openai.types.webhooks.DeletedWebhookEndpoint``."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class WebhookTestResult(BaseModel):
    """``openai.types.webhooks.WebhookEndpointTestResult``."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: _EventName
    status_code: int
    success: Literal[True] = True


class WebhookEventTypeList(BaseModel):
    """``openai.types.webhooks.WebhookEventTypeList``."""

    object: Literal["list"] = "list"
    data: list[_EventName] = list(get_args(_EventName))


def endpoint_object(endpoint: WebhookEndpoint) -> WebhookEndpointObject:
    """Without the secret."""
    return WebhookEndpointObject(**_fields(endpoint))


def endpoint_with_secret(endpoint: WebhookEndpoint) -> WebhookEndpointWithSecret:
    """For the two answers that show the secret."""
    return WebhookEndpointWithSecret(**_fields(endpoint), signing_secret=endpoint.secrets[0])


def _fields(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": endpoint.created_at,
        "updated_at": endpoint.updated_at,
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "signing_secret_hint": f"whsec_...{endpoint.secrets[0][-_HINT_LENGTH:]}",
    }
