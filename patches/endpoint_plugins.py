"""Attaches our routes to the API server when ``--enable-finetuning`` is given.

Why a patch: vLLM loads endpoint plugins only if they are named in ``VLLM_PLUGINS``, and setting
that variable hides all other general plugins that it does not name.
Fits vLLM 0.32 (``vllm/entrypoints/launchers/app.py``). On a release without the function the
plugin does not load, with a message that names it. Needless once an endpoint plugin can be loaded
by a flag.
"""

import functools
from typing import Any

from flexllm_vllm.patches import require


def apply() -> None:
    """Wraps ``attach_endpoint_plugins`` where ``build_app`` calls it; once."""
    from vllm.entrypoints.launchers import app as launcher

    attach = require(launcher, "attach_endpoint_plugins")
    if getattr(attach, "_finetuning", False):
        return

    @functools.wraps(attach)
    def attach_with_finetuning(app: Any, supported_tasks: tuple[str, ...]) -> None:
        attach(app, supported_tasks)
        if getattr(app.state.args, "enable_finetuning", False):
            from flexllm_vllm.api.plugin import FinetuningEndpointPlugin

            plugin = FinetuningEndpointPlugin()
            plugin.attach_router(app)
            app.state.endpoint_plugins = [*app.state.endpoint_plugins, plugin]

    attach_with_finetuning._finetuning = True  # type: ignore[attr-defined]
    launcher.attach_endpoint_plugins = attach_with_finetuning
