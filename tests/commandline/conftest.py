"""The command line against the real HTTP server of tests/api."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from flexllm_vllm.commandline import follow, patience
from flexllm_vllm.commandline.main import main
from tests.api.conftest import (
    Server,
    client,
    serve,
    server,
    start_server,
    toy_tokenizer,
    upload,
)

__all__ = ["client", "serve", "server", "start_server", "toy_tokenizer", "upload"]

LINES = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
) * 2


@dataclass(frozen=True)
class Result:
    """What a command has come to."""

    exit_code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def create(client: openai.OpenAI, upload: Callable[..., str]) -> Callable[..., str]:
    """Create a job; returns its id."""

    def create(**options: Any) -> str:
        options = {"model": "demo", "training_file": upload(), **options}
        return client.fine_tuning.jobs.create(**options).id

    return create


@pytest.fixture
def run(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line against the server, in this process."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(follow, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.02)

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["flexllm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """A training file of two examples."""
    path = tmp_path / "train.jsonl"
    path.write_text(LINES)
    return path
