"""What the store knows of webhook endpoints and deliveries."""

from dataclasses import dataclass, field


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
