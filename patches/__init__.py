"""Changes to vLLM that no extension point allows: one file each, with its reason and its end."""

from typing import Any


def require(owner: Any, name: str) -> Any:
    """The attribute that a patch replaces.

    Raises:
        RuntimeError: this release of vLLM does not have it.
    """
    if not hasattr(owner, name):
        raise RuntimeError(
            f"flexllm-vllm cannot patch {getattr(owner, '__name__', owner)}.{name}: this vLLM has "
            "none; vLLM 0.32 is supported"
        )
    return getattr(owner, name)
