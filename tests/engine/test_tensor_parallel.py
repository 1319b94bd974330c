"""Training and serving over two tensor-parallel ranks, against PEFT autograd and one rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ALL_TARGETS, random_adapter, random_examples, random_model
from prompts import SUBJECTS
from safetensors.torch import load_file
from server import (
    Server,
    generate,
    start_job,
    steps_within,
    train_file,
    wait_for,
    wait_for_status,
    wait_for_step,
)  # fmt: skip
from test_gradients import MODELS, TARGETS, Engine, assert_equal, reference_gradients


@pytest.fixture(
    scope="module",
    params=["llama-mha-untied", "qwen2-gqa-tied", "phi3-gqa-untied", "mixtral-gqa-untied"],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(folder / "model", **MODELS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        options = {"targets": TARGETS.get(request.param, ALL_TARGETS)}
        engine = Engine(model, folder, tensor_parallel_size=2, **options)
    yield engine
    engine.close()


@pytest.mark.parametrize("policy", ["store", "balanced", "minimal"])
def test_gradients_equal_peft_autograd(engine: Engine, policy: str) -> None:
    init = random_adapter(engine.model, engine.folder / f"adapter-{policy}", targets=engine.targets)
    examples = random_examples([150, 9, 70])
    expected = reference_gradients(engine, init, examples)
    engine.keep(policy)
    for window in (7, None):
        assert_equal(engine.one_step(examples, init, window), expected, 1e-4)


def test_more_ranks_than_kv_heads_are_refused(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", **MODELS["qwen3-mqa-untied"])
    with pytest.raises(RuntimeError):
        serve(model, tmp_path, 2)
    assert "divides the 1 KV heads of the model" in (tmp_path / "log").read_text()


def serve(model: Path, folder: Path, size: int) -> Server:
    return Server(
        model, folder / "log", "--enable-finetuning", "--finetuning-dir", str(folder / "store"),
        "--finetuning-checkpoint-interval-s", "0.3", "--tensor-parallel-size", str(size),
    )  # fmt: skip


def weights(folder: Path, job_id: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "store" / "jobs" / job_id / "adapter" / "adapter_model.safetensors")


# Long examples: a job of few steps is to last some seconds.
LINES = [
    json.dumps({
        "prompt": " ".join(f"w{3 + (7 * i + j) % 300}" for j in range(100)),
        "completion": " ".join(f" w{3 + (5 * i + j) % 300}" for j in range(40)),
    })
    for i in range(64)
]  # fmt: skip


def test_a_job_goes_on_at_another_size(tmp_path: Path) -> None:
    """Killed on one rank, then over two, it ends on one as if nothing had been; and what two ranks
    answer beside it is what they answer without it."""
    model = random_model(tmp_path / "model", heads=6, kv_heads=2, head_dim=32, inner=320, tied=True)
    options: dict[str, Any] = {"batch_size": 16, "seed": 3}
    server = serve(model, tmp_path, 1)
    try:
        client = server.client()
        file_id = train_file(client, LINES)
        # As long as it is looked at, whatever the machine.
        options["max_steps"] = steps_within(client, file_id, 15.0, warm_up=2, **options)
        unbroken = wait_for(client, start_job(client, file_id, **options).id)
        adapter = unbroken.fine_tuned_model
        answer = generate(client, SUBJECTS[:4], adapter, max_tokens=4)
        job = start_job(client, file_id, **options)
        wait_for_step(client, job.id, 2)
        server.kill()

        server = serve(model, tmp_path, 2)
        client = server.client()
        wait_for_step(client, job.id, 3)
        client.fine_tuning.jobs.pause(job.id)
        wait_for_status(client, job.id, "paused")
        quiet = [c.text for c in generate(client, SUBJECTS)]
        answer_of_two = generate(client, SUBJECTS[:4], adapter, max_tokens=4)
        assert [c.text for c in answer_of_two] == [c.text for c in answer]
        client.fine_tuning.jobs.resume(job.id)
        wait_for_status(client, job.id, "running")
        assert [c.text for c in generate(client, SUBJECTS)] == quiet
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        server.kill()

        server = serve(model, tmp_path, 1)
        client = server.client()
        ended = wait_for(client, job.id)
        assert ended.status == "succeeded", ended.error
        expected, found = weights(tmp_path, unbroken.id), weights(tmp_path, job.id)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            error = float((tensor - found[name]).norm() / tensor.norm())
            assert error < 1e-4, f"{name}: {error:.2e}"
    finally:
        server.kill()
