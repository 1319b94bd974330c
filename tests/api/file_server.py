"""A server of files in a process of its own: ``python file_server.py STORE``; prints its port.

Any use of the temporary folder fails.
"""

import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from flexllm_vllm.api import files, uploads
from flexllm_vllm.api.service import FinetuningService
from flexllm_vllm.jobs import JobStore


def _unused(*_args: Any) -> Any:
    raise AssertionError("files need the store alone")


def main(root: Path) -> None:
    tempfile.tempdir = str(root / "no-such-folder")
    app = FastAPI()
    app.include_router(files.router)
    app.include_router(uploads.router)
    store = JobStore(root)
    store.clean_up()
    app.state.finetuning = FinetuningService(
        store, _unused, ("demo",), 8, 256, _unused, _unused, num_layers=1
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
