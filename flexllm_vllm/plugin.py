"""vLLM's entry point into this package (group ``vllm.general_plugins``).

vLLM calls :func:`register` in every process. It adds the flags and, for servers that have
``--enable-finetuning``, the routes; nothing else happens without that flag. Scheduler and worker
are found by their names in the engine's configuration, and apply the patches that they need.
"""


def register() -> None:
    """Installs the flags and the hook for the routes. May be called more than once."""
    from flexllm_vllm import cli
    from flexllm_vllm.patches import access, endpoint_plugins

    cli.install()
    endpoint_plugins.apply()
    access.apply()
