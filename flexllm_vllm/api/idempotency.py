"""The header ``Idempotency-Key``: a request that is sent twice creates one object."""

import hashlib
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Header

from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.api.tenants import Tenant
from flexllm_vllm.jobs.idempotency import IdempotencyClaim
from flexllm_vllm.jobs.store import JobStore

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="A value of your own, new for each object that you create. Within 24 hours, "
        "the same request with the same key answers with the object that was created first.",
    ),
]


Created = TypeVar("Created")


def create_once(
    store: JobStore,
    tenant: Tenant,
    route: str,
    key: str | None,
    fingerprint: Callable[[], bytes],
    create: Callable[[IdempotencyClaim | None], Created],
    get: Callable[[str], Created],
) -> Created:
    """What ``create`` makes, or has made for an earlier request with this key. Blocks.

    Args:
        route: keys of different routes are different keys.
        fingerprint: the same for requests that are the same.
        create: completes the claim in the transaction that creates: with the id of what it has
            created, which a process that dies then has created for its key.
        get: the object of an id.

    Raises:
        ApiError: the object was deleted since.
        IdempotencyConflictError, IdempotencyPendingError: see ``IdempotencyKeys.claim``.
    """
    if key is None:
        return create(None)
    claim = IdempotencyClaim(tenant.organization_id, route, key)
    object_id = store.idempotency.claim(claim, hashlib.sha256(fingerprint()).hexdigest())
    if object_id is not None:
        try:
            return get(object_id)
        except LookupError:
            message = f"This Idempotency-Key created {object_id}, which was deleted since"
            raise ApiError(409, message, "Idempotency-Key", "idempotency_key_in_use") from None
    try:
        return create(claim)
    except BaseException:
        store.idempotency.release(claim)
        raise
