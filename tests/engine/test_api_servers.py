"""Several API processes beside one engine."""

from pathlib import Path

from models import random_llama
from server import Server, start_job, train_file, wait_for


def test_every_api_process_serves_files_jobs_and_the_adapter_at_once(tmp_path: Path) -> None:
    model = random_llama(
        tmp_path / "model", heads=6, kv_heads=2, head_dim=32, inner=320, tied=True, layers=2
    )
    server = Server(
        model,
        tmp_path / "log",
        "--enable-finetuning",
        "--finetuning-dir",
        str(tmp_path / "store"),
        "--api-server-count",
        "2",
    )
    try:
        line = '{"prompt": "w5 w6", "completion": " w7 w8"}'
        file_id = train_file(server.client(), [line] * 4)
        job = start_job(server.client(), file_id, max_steps=2, batch_size=2)
        job = wait_for(server.client(), job.id)
        assert job.status == "succeeded", job.error
        for _ in range(12):  # new connections: the kernel spreads them over the processes
            with server.client() as client:
                assert job.fine_tuned_model in [m.id for m in client.models.list()]
                assert client.files.retrieve(file_id).id == file_id
                client.completions.create(model=job.fine_tuned_model, prompt="w5 w6", max_tokens=2)
    finally:
        server.kill()
