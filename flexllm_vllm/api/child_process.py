"""The environment of programs of ours that run beside the server."""

import os
from collections.abc import Mapping
from pathlib import Path

import flexllm_vllm


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The server's, in which the program finds this package and takes one core."""
    # Where this package lies, and not the folder in which the server was started.
    paths = [str(Path(flexllm_vllm.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
