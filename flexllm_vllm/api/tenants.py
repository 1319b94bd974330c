"""On whose behalf a request is: everything that it may see belongs to one organization."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from fastapi import Depends, Request

from flexllm_vllm.jobs.quotas import Quotas
from flexllm_vllm.jobs.schema import LOCAL_ORGANIZATION


class Role(StrEnum):
    """What a key may do, each more than the one after it."""

    ADMIN = "admin"
    MEMBER = "member"
    READ_ONLY = "read_only"


@dataclass(frozen=True)
class Tenant:
    """Who asks. ``organization_id`` owns what the request creates and bounds what it sees."""

    organization_id: str
    role: Role = Role.ADMIN
    quotas: Quotas = field(default_factory=Quotas)


LOCAL = Tenant(LOCAL_ORGANIZATION)

# The organization whose request the current task serves, for code of vLLM that knows no tenants.
# None: not a request, or a server without tenants; everything may be seen.
current_organization: ContextVar[str | None] = ContextVar("current_organization", default=None)


def get_tenant(request: Request) -> Tenant:
    """The tenant that the server's authentication found; the only one where it has no tenants."""
    return getattr(request.state, "tenant", LOCAL)


CurrentTenant = Annotated[Tenant, Depends(get_tenant)]
