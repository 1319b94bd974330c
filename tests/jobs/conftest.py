import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexllm_vllm.jobs import FinetuningJob, JobStore, LoraSpec, NewJob, TrainingSpec
from flexllm_vllm.jobs.names import adapter_name


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "state" / "store") as store:
        yield store


@pytest.fixture
def add_job(store: JobStore) -> Callable[..., FinetuningJob]:
    """Queue a job with a training file of its own."""

    def add(model: str = "demo", **changes: Any) -> FinetuningJob:
        file = store.files.create(io.BytesIO(b"{}"), "data.jsonl", "fine-tune")
        job_id, _ = store.new_job()
        values: dict[str, Any] = {
            "id": job_id,
            "model": model,
            "adapter_name": adapter_name(model, "local", None, job_id),
            "training_file": file.id,
            "lora": LoraSpec(),
            "training": TrainingSpec(batch_size=4, max_seq_length=512, seed=7),
            "total_steps": 30,
            "hyperparameters": {"n_epochs": "auto"},
        }
        return store.create_job(NewJob(**{**values, **changes}))

    return add
