"""Which routes are open, which are for tenants, and what a role may do there."""

from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.api.prefixes import is_below
from flexllm_vllm.api.tenants import Role, Tenant

# Nothing of a tenant is here: probes, figures of the whole server, the description of the API, and
# the web page, which asks for a key before it shows anything.
OPEN = (
    "/health",
    "/ping",
    "/version",
    "/load",
    "/metrics",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/finetuning",
)
# Uses a model and changes nothing.
_INFERENCE = (
    "/v1/audio",
    "/v1/chat",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/realtime",
    "/v1/rerank",
    "/v1/responses",
    "/v1/score",
    "/v1/systemone",
    "/v2",
    "/inference",
    "/cohere",
    "/classify",
    "/detokenize",
    "/generative_scoring",
    "/invocations",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
)
# Of vLLM, below prefixes that tenants use: they act on the server or on requests of others.
_OPERATOR = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/inference/v1/abort_requests",
)
_ADMIN_TO_CHANGE = ("/v1/models", "/v1/webhook_endpoints")
# Members import and merge adapters, too.
_ADMIN_TO_DELETE = ("/v1/finetuning/adapters",)
_READING = ("GET", "HEAD")


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return is_below(path, OPEN)


def check_permission(tenant: Tenant, method: str, path: str) -> None:
    """Whether a key of the keys file may do this. What is not known to be a tenant's is refused:
    vLLM's development routes, and those that it may get.

    Raises:
        ApiError: 403.
    """
    inference = is_below(path, _INFERENCE)
    if is_below(path, _OPERATOR) or not (inference or is_below(path, ("/v1",))):
        raise _forbidden("This route is for the operator of the server (the key of --api-key).")
    if inference or method in _READING:
        return
    if tenant.role is Role.READ_ONLY:
        raise _forbidden("Your key has the role 'read_only': it cannot create, change or delete.")
    for_admins = (*_ADMIN_TO_CHANGE, *(_ADMIN_TO_DELETE if method == "DELETE" else ()))
    if tenant.role is not Role.ADMIN and is_below(path, for_admins):
        raise _forbidden(f"Your key has the role '{tenant.role}'; this needs the role 'admin'.")


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="insufficient_permissions")
