"""Puts our check of keys before vLLM's (``flexllm_vllm/api/access.py``).

Why a patch: an endpoint plugin is called before vLLM adds its own middlewares, so that those would
be outside of what it adds: vLLM's key check would refuse the keys of ``--finetuning-keys-file`` and
answer 401 in a form that is not OpenAI's. Later the application's middlewares are built already.
Fits vLLM 0.32 (``vllm/entrypoints/launchers/app.py``); on a release without the function the plugin
does not load, with a message that names it. Needless once an endpoint plugin can bring a middleware
that comes before vLLM's.
"""

import functools
from typing import Any

from flexllm_vllm.patches import require


def apply() -> None:
    """Wraps ``init_entrypoints_middleware`` where ``build_app`` calls it; once."""
    from vllm import envs
    from vllm.entrypoints.launchers import app as launcher

    init = require(launcher, "init_entrypoints_middleware")
    if getattr(init, "_finetuning", False):
        return

    @functools.wraps(init)
    def init_with_access(args: Any, app: Any, supported_tasks: tuple[str, ...]) -> None:
        init(args, app, supported_tasks)
        from flexllm_vllm.api.access import install_access
        from flexllm_vllm.flags import config_from_args

        config = config_from_args(args)
        if config is not None:
            # The keys that vLLM's own check takes.
            tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
            install_access(app, tokens, config.keys_file)

    init_with_access._finetuning = True  # type: ignore[attr-defined]
    launcher.init_entrypoints_middleware = init_with_access
