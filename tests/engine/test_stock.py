"""Inference beside a job, token by token against a server without the plugin's flag."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from models import first_layers
from prompts import PROMPTS, shouting
from server import Server, generate, start_job, train_file, wait_for, wait_for_step

# A batch of another size rounds otherwise, with or without us: where two tokens are this close,
# either may come first.
TIE = 1e-4


@pytest.fixture(scope="module")
def short_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fifth of the real model: two graphs of all of it take four minutes to compile."""
    return first_layers(demo_model, tmp_path_factory.mktemp("short") / "model", 6)


@pytest.fixture(scope="module")
def stock(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("stock")
    server = Server(short_model, folder / "log", compiled=True)
    try:
        for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/finetuning/iterations"):
            assert httpx.get(server.url + path).status_code == 404
        return generate(server.client(), PROMPTS, max_tokens=32)
    finally:
        server.kill()


def test_tokens_equal_a_stock_servers_beside_a_running_job(
    stock: list[Any], short_model: Path, tmp_path: Path
) -> None:
    server = Server(
        short_model, tmp_path / "log", "--enable-finetuning", "--finetuning-dir",
        str(tmp_path / "finetuning"), compiled=True,
    )  # fmt: skip
    try:
        client = server.client()
        job = start_job(
            client, train_file(client, shouting(60)), n_epochs=50, batch_size=4, learning_rate=1e-3
        )
        wait_for_step(client, job.id, 2)
        ours = generate(client, PROMPTS, max_tokens=32)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        client.fine_tuning.jobs.cancel(job.id)
        wait_for(client, job.id)
    finally:
        server.kill()
    for expected, got in zip(stock, ours, strict=True):
        if expected.text == got.text:
            continue
        tokens = list(zip(expected.logprobs.tokens, got.logprobs.tokens, strict=False))
        first = next(i for i, (a, b) in enumerate(tokens) if a != b)
        top = sorted(expected.logprobs.top_logprobs[first].values())
        assert top[-1] - top[-2] < TIE, f"{expected.text!r} became {got.text!r}"
