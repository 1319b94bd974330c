"""``/v1/webhook_endpoints`` and ``/v1/webhook_event_types``."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from flexllm_vllm.api.background import while_serving
from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import ApiError, OpenAIRoute, invalid
from flexllm_vllm.api.pages import Limit
from flexllm_vllm.api.public_network import AddressError
from flexllm_vllm.api.schemas import ERRORS
from flexllm_vllm.api.tenants import CurrentTenant
from flexllm_vllm.api.webhook_objects import (
    DeletedWebhookEndpoint,
    WebhookCreateRequest,
    WebhookEndpointList,
    WebhookEndpointObject,
    WebhookEndpointWithSecret,
    WebhookEventTypeList,
    WebhookRotateSecretRequest,
    WebhookTestRequest,
    WebhookTestResult,
    WebhookUpdateRequest,
    endpoint_object,
    endpoint_with_secret,
)
from flexllm_vllm.api.webhook_sender import SendError, WebhookSender


def get_sender(request: Request) -> WebhookSender:
    """What ``FinetuningEndpointPlugin.init_state`` has put into the state.

    Raises:
        ApiError: this server has no engine.
    """
    sender: WebhookSender | None = getattr(request.app.state, "finetuning_webhooks", None)
    if sender is None:
        raise ApiError(503, "Webhooks are not available: this server has no engine.")
    return sender


Sender = Annotated[WebhookSender, Depends(get_sender)]


router = APIRouter(
    prefix="/v1",
    route_class=OpenAIRoute,
    tags=["finetuning"],
    lifespan=while_serving("finetuning_webhooks"),
    responses=ERRORS,
)


@router.post("/webhook_endpoints")
async def create_webhook_endpoint(
    body: WebhookCreateRequest, service: Service, sender: Sender, tenant: CurrentTenant
) -> WebhookEndpointWithSecret:
    """Report the ends of jobs to a URL. The answer holds the signing secret, here only."""
    await _check_url(sender, body.url)
    endpoint = await asyncio.to_thread(
        service.store.webhooks.create,
        body.name,
        body.url,
        body.event_types,
        tenant.organization_id,
    )
    return endpoint_with_secret(endpoint)


@router.get("/webhook_endpoints")
async def list_webhook_endpoints(
    service: Service,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Limit = 20,
) -> WebhookEndpointList:
    """Webhook endpoints, newest first."""
    endpoints, has_more = await asyncio.to_thread(
        service.store.webhooks.page, after, limit, tenant.organization_id
    )
    return WebhookEndpointList.of([endpoint_object(e) for e in endpoints], has_more)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
async def get_webhook_endpoint(
    webhook_endpoint_id: str, service: Service, tenant: CurrentTenant
) -> WebhookEndpointObject:
    """One webhook endpoint."""
    return endpoint_object(
        await asyncio.to_thread(
            service.store.webhooks.get, webhook_endpoint_id, tenant.organization_id
        )
    )


@router.post("/webhook_endpoints/{webhook_endpoint_id}")
async def update_webhook_endpoint(
    webhook_endpoint_id: str,
    body: WebhookUpdateRequest,
    service: Service,
    sender: Sender,
    tenant: CurrentTenant,
) -> WebhookEndpointObject:
    """Change name, URL or event types. Deliveries that wait go to the new URL."""
    if body.url is not None:
        await _check_url(sender, body.url)
    endpoint = await asyncio.to_thread(
        service.store.webhooks.update,
        webhook_endpoint_id,
        body.name,
        body.url,
        body.event_types,
        tenant.organization_id,
    )
    return endpoint_object(endpoint)


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
async def delete_webhook_endpoint(
    webhook_endpoint_id: str, service: Service, tenant: CurrentTenant
) -> DeletedWebhookEndpoint:
    """Delete a webhook endpoint, and what waits to be delivered to it."""
    await asyncio.to_thread(
        service.store.webhooks.delete, webhook_endpoint_id, tenant.organization_id
    )
    return DeletedWebhookEndpoint(id=webhook_endpoint_id)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
async def rotate_webhook_secret(
    webhook_endpoint_id: str,
    service: Service,
    tenant: CurrentTenant,
    body: WebhookRotateSecretRequest | None = None,
) -> WebhookEndpointWithSecret:
    """A new signing secret, in this answer only. The old one signs too for 24 hours if asked to."""
    keep_old = bool(body and body.keep_old_secret_active_for_24_hours)
    endpoint = await asyncio.to_thread(
        service.store.webhooks.rotate_secret, webhook_endpoint_id, keep_old, tenant.organization_id
    )
    return endpoint_with_secret(endpoint)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test")
async def test_webhook_endpoint(
    webhook_endpoint_id: str,
    body: WebhookTestRequest,
    service: Service,
    sender: Sender,
    tenant: CurrentTenant,
) -> WebhookTestResult:
    """Send a sample event at once; the answer has the status code that came back."""
    endpoint = await asyncio.to_thread(
        service.store.webhooks.get, webhook_endpoint_id, tenant.organization_id
    )
    try:
        status = await sender.test(endpoint, body.event_type)
    except SendError as error:
        raise invalid(
            f"The test could not be delivered: {error}", None, "webhook_test_failed"
        ) from None
    return WebhookTestResult(
        webhook_endpoint_id=endpoint.id, event_type=body.event_type, status_code=status
    )


@router.get("/webhook_event_types")
async def list_webhook_event_types(service: Service) -> WebhookEventTypeList:
    """What a webhook endpoint can subscribe to."""
    return WebhookEventTypeList()


async def _check_url(sender: WebhookSender, url: str) -> None:
    try:
        await sender.check_url(url)
    except AddressError as error:
        raise invalid(f"Invalid value for 'url': {error}", "url", "invalid_webhook_url") from None
