"""On whose behalf a request is: everything that it may see belongs to one organization."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from flexllm_vllm.jobs.schema import LOCAL_ORGANIZATION


@dataclass(frozen=True)
class Tenant:
    """Who asks. ``organization_id`` owns what the request creates and bounds what it sees."""

    organization_id: str


LOCAL = Tenant(LOCAL_ORGANIZATION)


def get_tenant(request: Request) -> Tenant:
    """The tenant that the server's authentication found; the only one where it has no tenants."""
    return getattr(request.state, "tenant", LOCAL)


CurrentTenant = Annotated[Tenant, Depends(get_tenant)]
