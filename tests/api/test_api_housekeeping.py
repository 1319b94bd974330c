"""What is over goes while the server runs, without a request."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flexllm_vllm.api.housekeeping import Housekeeping
from flexllm_vllm.api.plugin import attach_routes
from flexllm_vllm.jobs import JobStore
from flexllm_vllm.jobs import files as files_module


def test_an_expired_file_is_removed(
    tmp_path: Path, serve: Callable[[FastAPI], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with JobStore(tmp_path / "store") as store:
        with store.files.begin() as partial:
            partial.write(b"x")
            file = store.files.add(partial, "a", "fine-tune", expires_after_s=3600)
        path = store.files.path(file.id)
        app = FastAPI()
        attach_routes(app)
        housekeeping = Housekeeping(store, interval_s=0.05)
        app.state.finetuning_housekeeping = housekeeping
        fails: Any = iter([True])
        sweep = store.sweep
        monkeypatch.setattr(store, "sweep", lambda: 1 / 0 if next(fails, False) else sweep())
        url = serve(app)
        time.sleep(0.3)
        assert path.exists()
        monkeypatch.setattr(files_module, "now", lambda: int(time.time()) + 3601)
        deadline = time.monotonic() + 10
        while path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert httpx.get(f"{url}/v1/files").status_code == 503  # there is no engine here
