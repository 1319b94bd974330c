"""Which releases of vLLM this plugin works with."""

SUPPORTED = "0.32.*"


def check_vllm_release(version: str) -> None:
    """Raises ValueError on a release whose internals this plugin does not know.

    The plugin hooks private interfaces of the scheduler and the worker: on another release it
    would half-work, so it does not work at all.
    """
    if version.split(".")[:2] != SUPPORTED.split(".")[:2]:
        raise ValueError(
            f"--enable-finetuning supports vLLM {SUPPORTED}, and this is vLLM {version}; install "
            f'"vllm=={SUPPORTED}", or a release of flexllm-vllm for this one'
        )
