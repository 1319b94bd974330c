"""Which paths are ours, as a router sees them."""

from starlette._utils import get_route_path
from starlette.types import Scope

# Everything below these answers in OpenAI's form, whatever it is.
PREFIXES = (
    "/v1/files",
    "/v1/uploads",
    "/v1/fine_tuning",
    "/v1/fine_tunes",
    "/v1/fine-tunes",
    "/v1/finetuning",
    "/v1/webhook_endpoints",
    "/v1/webhook_event_types",
)

# Below it our routes of one model; the list is vLLM's.
_MODELS = "/v1/models/"


def route_path(scope: Scope) -> str:
    """The path that routes are compared with: ``--root-path`` taken off, by the same function."""
    return get_route_path(scope)


def is_below(path: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a path is one of ``prefixes`` or lies below one."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def is_ours(scope: Scope) -> bool:
    """Whether a request is for one of our paths, known or not."""
    path = route_path(scope)
    return is_below(path, PREFIXES) or path.startswith(_MODELS)
