"""Servers that are killed, and servers that are asked to stop, with a job running."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_model
from prompts import SUBJECTS
from safetensors.torch import load_file
from server import (
    Server,
    start_job,
    steps,
    steps_within,
    train_file,
    wait_for,
    wait_for_status,
    wait_for_step,
)

from flexllm_vllm.checkpoints import resumable_steps

# More of them in a long run of this file: FLEXLLM_TEST_KILLS=20; at other moments with another
# FLEXLLM_TEST_SEED.
KILLS = int(os.environ.get("FLEXLLM_TEST_KILLS", "2"))
SEED = int(os.environ.get("FLEXLLM_TEST_SEED", "7"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Small, so that starting a server three times does not take long."""
    return random_model(
        tmp_path / "model", heads=6, kv_heads=2, head_dim=32, inner=320, tied=True, layers=2
    )


LINES = [f'{{"prompt": "w{i + 3} w{i + 4}", "completion": " w{i + 5} w{i + 6}"}}'
         for i in range(200)]  # fmt: skip


def serve(model: Path, folder: Path, *flags: str) -> Server:
    store = str(folder / "store")
    return Server(model, folder / "log", "--enable-finetuning", "--finetuning-dir", store, *flags)


def test_a_killed_server_comes_back_with_its_jobs_files_and_adapters(
    model: Path, tmp_path: Path
) -> None:
    server = serve(model, tmp_path)
    try:
        client = server.client()
        file_id = train_file(client, LINES)
        done = wait_for(client, start_job(client, file_id, max_steps=3, batch_size=2).id)
        assert done.status == "succeeded", done.error
        answer = client.completions.create(
            model=done.fine_tuned_model, prompt=SUBJECTS[0], max_tokens=4, temperature=0
        ).choices[0]
        # Too long to end before it is looked at, however fast the machine.
        many = train_file(client, LINES * 10)
        broken = start_job(client, many, n_epochs=50, batch_size=2)
        wait_for_step(client, broken.id, 2)
    finally:
        server.kill()

    server = serve(model, tmp_path)
    try:
        client = server.client()
        assert client.files.content(file_id).text.splitlines() == LINES
        assert client.fine_tuning.jobs.retrieve(done.id).status == "succeeded"
        again = client.completions.create(
            model=done.fine_tuned_model, prompt=SUBJECTS[0], max_tokens=4, temperature=0
        ).choices[0]
        assert again.text == answer.text
        job = wait_for_resumption(client, broken.id)
        assert job.status == "running"
        events = [e.message for e in client.fine_tuning.jobs.list_events(broken.id, limit=100)]
        assert any("continues from its last checkpoint" in message for message in events)
        # SIGTERM with the job running.
        assert server.terminate(timeout=60) == 0
    finally:
        server.kill()


def test_two_servers_on_one_folder_share_its_jobs(model: Path, tmp_path: Path) -> None:
    """Each job is run by one of them; when that one is killed, by the other."""
    first = serve(model, tmp_path, "--finetuning-checkpoint-interval-s", "0.3")
    try:
        second = serve(model, tmp_path, "--finetuning-checkpoint-interval-s", "0.3")
        try:
            client = first.client()
            many = train_file(client, LINES * 10)
            # Too long to end, however fast the machine.
            endless = {"max_steps": 10_000, "batch_size": 2}
            jobs = {start_job(client, many, **endless).id for _ in range(2)}
            client = second.client()
            for job_id in jobs:  # a server runs one job at a time
                wait_for_step(client, job_id, 2)
            status = {i: client.fine_tuning.jobs.retrieve(i).status for i in jobs}
            assert set(status.values()) == {"running"}
            first.kill()
            orphan = queued_one(client, jobs)
            (other,) = jobs - {orphan}
            client.fine_tuning.jobs.cancel(other)
            wait_for_status(client, orphan, "running")
            last = steps(client, orphan)[-1][0]
            wait_for_step(client, orphan, last + 3)
            done = [step for step, _ in steps(client, orphan)]
            assert done == list(range(1, len(done) + 1))
            client.fine_tuning.jobs.cancel(orphan)
            assert {wait_for(client, i).status for i in jobs} == {"cancelled"}
            short = wait_for(client, start_job(client, many, max_steps=3, batch_size=2).id)
            assert short.status == "succeeded", short.error
            answer = client.completions.create(
                model=short.fine_tuned_model, prompt=SUBJECTS[0], max_tokens=2
            )
            assert answer.choices[0].text
        finally:
            second.kill()
    finally:
        first.kill()


def queued_one(client: Any, jobs: set[str], timeout: float = 60) -> str:
    """The job that waits, once one does."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for job_id in jobs:
            if client.fine_tuning.jobs.retrieve(job_id).status == "queued":
                return job_id
        time.sleep(0.1)
    raise TimeoutError(jobs)


def wait_for_resumption(client, job_id: str):
    for _ in range(100):
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status == "running":
            return job
        time.sleep(0.1)
    return job


def test_sigterm_ends_a_server_with_a_running_job_cleanly(model: Path, tmp_path: Path) -> None:
    server = serve(model, tmp_path)
    try:
        client = server.client()
        job = start_job(client, train_file(client, LINES), n_epochs=50, batch_size=2)
        wait_for_step(client, job.id)
        client_events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        assert server.terminate(timeout=30) == 0
        shutdown = [x for x in server.log.read_text().splitlines() if "[shutdown]" in x]
        assert any("request processing complete" in line for line in shutdown)
        assert not any("force killing remaining" in line for line in shutdown)
        # No step is lost: a checkpoint holds the last that was reported.
        last = max(e.data["step"] for e in client_events if e.type == "metrics")
        kept = resumable_steps(tmp_path / "store" / "jobs" / job.id / "checkpoints")
        assert kept[-1] >= last
    finally:
        server.kill()


def weights(folder: Path, job_id: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "store" / "jobs" / job_id / "adapter" / "adapter_model.safetensors")


@pytest.mark.timeout(240 + 120 * (KILLS + 2))
def test_a_job_that_is_killed_ends_with_the_weights_of_an_unbroken_one(
    model: Path, tmp_path: Path
) -> None:
    options = {"batch_size": 4, "seed": 3}
    choose = random.Random(SEED)
    server = serve(model, tmp_path, "--finetuning-checkpoint-interval-s", "0.3")
    try:
        client = server.client()
        file_id = train_file(client, LINES)
        # A server trains for a second or two before it answers: not to the end of the job.
        options["max_steps"] = steps_within(client, file_id, 6.0 * (KILLS + 1), **options)
        unbroken = wait_for(client, start_job(client, file_id, **options).id)
        expected = steps(client, unbroken.id)
        job = start_job(client, file_id, **options)
        for _ in range(KILLS):
            assert wait_for_resumption(client, job.id).status == "running"
            time.sleep(choose.uniform(0.0, 1.5))
            assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
            server.kill()
            server = serve(model, tmp_path, "--finetuning-checkpoint-interval-s", "0.3")
            client = server.client()
        ended = wait_for(client, job.id)
        assert ended.status == "succeeded", ended.error
        found = steps(client, job.id)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([x for _, x in expected], rel=1e-3)
        first, second = weights(tmp_path, unbroken.id), weights(tmp_path, job.id)
        for name, tensor in first.items():
            error = float((tensor - second[name]).norm() / tensor.norm())
            assert error < 1e-4, name
        assert ended.trained_tokens == unbroken.trained_tokens
    finally:
        server.kill()
