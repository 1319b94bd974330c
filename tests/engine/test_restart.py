"""Servers that are killed, and servers that are asked to stop, with a job running."""

from pathlib import Path

import pytest
from models import random_llama
from prompts import SUBJECTS
from server import Server, start_job, train_file, wait_for, wait_for_step


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Small, so that starting a server three times does not take long."""
    return random_llama(
        tmp_path / "model", heads=6, kv_heads=2, head_dim=32, inner=320, tied=True, layers=2
    )


LINES = [f'{{"prompt": "w{i + 3} w{i + 4}", "completion": " w{i + 5} w{i + 6}"}}'
         for i in range(200)]  # fmt: skip


def serve(model: Path, folder: Path) -> Server:
    return Server(
        model, folder / "log", "--enable-finetuning", "--finetuning-dir", str(folder / "store")
    )


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
        broken = start_job(client, file_id, n_epochs=20, batch_size=2)
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
        assert any("begin" in message or "again" in message for message in events)
        # SIGTERM with the job running.
        assert server.terminate(timeout=60) == 0
    finally:
        server.kill()


def wait_for_resumption(client, job_id: str):
    import time

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
        assert server.terminate(timeout=30) == 0
        shutdown = [x for x in server.log.read_text().splitlines() if "[shutdown]" in x]
        assert any("request processing complete" in line for line in shutdown)
        assert not any("force killing remaining" in line for line in shutdown)
    finally:
        server.kill()
