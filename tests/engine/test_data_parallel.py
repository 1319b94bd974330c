"""Two engines of one server (``--data-parallel-size 2``) on one job store."""

from pathlib import Path

import httpx
import openai
import pytest
from models import random_model
from prompts import SUBJECTS
from server import Server, generate, start_job, train_file, wait_for, wait_for_step

NUM_STEPS = 300
LINES = [f'{{"prompt": "w{i + 3} w{i + 4}", "completion": " w{i + 5} w{i + 6}"}}'
         for i in range(200)]  # fmt: skip


def test_each_job_is_run_by_one_engine_and_its_adapter_served_by_all(tmp_path: Path) -> None:
    model = random_model(
        tmp_path / "model", heads=6, kv_heads=2, head_dim=32, inner=320, tied=True, layers=2
    )
    server = Server(
        model, tmp_path / "log", "--enable-finetuning", "--finetuning-dir", str(tmp_path / "store"),
        "--data-parallel-size", "2",
    )  # fmt: skip
    try:
        client = server.client()
        file_id = train_file(client, LINES)
        # Two that run for as long as they are looked at, one for each engine.
        long = [start_job(client, file_id, max_steps=100_000).id for _ in range(2)]
        for job_id in long:
            wait_for_step(client, job_id, 2)
        records = httpx.get(f"{server.url}/v1/finetuning/iterations?last=1000").json()["data"]
        assert {r["engine"] for r in records if r["finetuning_backward_tokens"]} == {0, 1}
        for job_id in long:
            client.fine_tuning.jobs.cancel(job_id)
        jobs = [start_job(client, file_id, max_steps=NUM_STEPS, batch_size=2) for _ in range(3)]
        for job in jobs:
            ended = wait_for(client, job.id)
            assert ended.status == "succeeded", ended.error
            events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
            steps = [e.data["step"] for e in events[::-1] if e.type == "metrics"]  # type: ignore
            assert steps == list(range(1, NUM_STEPS + 1))
            # Sixteen at once are shared out to both engines.
            answers = generate(client, SUBJECTS[:1] * 16, ended.fine_tuned_model, parallel=16)
            assert len({answer.text for answer in answers}) == 1
        deleted = ended.fine_tuned_model
        client.models.delete(deleted)
        for _ in range(4):
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model=deleted, prompt=SUBJECTS[0], max_tokens=1)
    finally:
        server.kill()
