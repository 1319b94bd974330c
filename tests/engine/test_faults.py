"""Code that raises, disks that are full, data that is gone: a job fails, and that job only."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import harness
import psutil
import pytest
from models import random_examples, random_model
from test_gradients import MODELS
from vllm import LLM, SamplingParams

from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import FinetuningJob, JobStatus, LoraSpec, TrainingSpec

NUM_STREAMS = 20
LORA = LoraSpec(r=4, lora_alpha=8)


class Engine:
    """An engine, a job that trains all the while, and what requests get without any job."""

    def __init__(self, folder: Path) -> None:
        model = random_model(folder / "model", **MODELS["qwen2-gqa-tied"])
        self.store = JobStore(folder / "store")
        options = harness.engine_options(
            folder / "store", max_jobs=2, checkpoint_interval_s=0.2, activation_cache_tokens=1024,
            tpot_slo_ms=200.0,
        )  # fmt: skip
        classes = {"scheduler_cls": "faults.FaultScheduler", "worker_cls": "faults.FaultWorker"}
        self.llm = LLM(
            str(model), dtype="float32", max_model_len=512, max_num_seqs=NUM_STREAMS,
            served_model_name="base", kv_cache_memory_bytes=1 << 28, enforce_eager=True, seed=0,
            **{**options, **classes},
        )  # fmt: skip
        self.expected = self.streams()
        self.neighbour = self.start_neighbour()

    def streams(self) -> list[list[int]]:
        """Tokens of 20 greedy requests at once."""
        self.llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": ids} for ids, _ in random_examples([12] * NUM_STREAMS, 4)]
        greedy = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        outputs = self.llm.generate(prompts, greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def submit(self, metadata: Any = None, **options: Any) -> FinetuningJob:
        training = {"batch_size": 2, "max_seq_length": 512, "seed": 0, "eval_steps": 1}
        return harness.submit(
            self.store, "base", random_examples([40, 25, 60, 33], seed=2), LORA,
            TrainingSpec(**{**training, **options}), metadata=metadata,
            validation=random_examples([30], seed=3),
        )  # fmt: skip

    def start_neighbour(self, **options: Any) -> FinetuningJob:
        """A job that nothing is done to."""
        length = options or {"n_epochs": 10_000}
        job = self.submit(
            learning_rate=1e-4, lr_scheduler_type="constant", eval_steps=100_000, **length
        )
        self.wait_for_step(job, 2)
        return job

    def wait_for_step(self, job: FinetuningJob, step: int, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while self.store.get_job(job.id).step < step:
            assert time.monotonic() < deadline, self.store.get_job(job.id)
            time.sleep(0.02)

    def serve_until(self, condition: Callable[[], bool]) -> None:
        """20 streams, again and again, each with the tokens that it has without a job."""
        deadline = time.monotonic() + 60
        while True:
            assert self.streams() == self.expected
            if condition():
                return
            assert time.monotonic() < deadline

    def has_ended(self, job: FinetuningJob) -> bool:
        return self.store.get_job(job.id).status.finished

    def failed(self, job: FinetuningJob) -> Any:
        """The error of a job that is to fail."""
        job = harness.wait(self.store, job.id, timeout=60)
        assert job.status is JobStatus.FAILED
        return job.error

    def check_others(self) -> None:
        """The neighbour trains on, and a new job runs to its end."""
        self.wait_for_step(self.neighbour, self.store.get_job(self.neighbour.id).step + 3)
        job = harness.wait(self.store, self.submit(max_steps=2).id, timeout=60)
        assert job.status is JobStatus.SUCCEEDED, job.error

    @property
    def processes(self) -> dict[str, psutil.Process]:
        (worker,) = self.llm.collective_rpc(harness.on_worker_pid)
        return {"worker": psutil.Process(worker), "engine": psutil.Process(worker).parent()}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("faults"))
    yield engine
    engine.store.close()
    engine.llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("place", faults.FaultScheduler.PLACES + faults.FaultWorker.PLACES)
def test_an_exception_fails_its_job_while_20_streams_are_served(engine: Engine, place: str) -> None:
    job = engine.submit({"fault": place}, n_epochs=10_000)
    engine.wait_for_step(job, 3)
    if place in faults.FaultWorker.PLACES:
        engine.llm.collective_rpc("break_job", args=(job.id, place))
    engine.serve_until(lambda: engine.has_ended(job))
    assert faults.MESSAGE in engine.failed(job).message
    engine.check_others()


def test_the_neighbour_of_all_these_has_the_losses_of_a_job_alone(engine: Engine) -> None:
    store = engine.store
    store.request_cancel(engine.neighbour.id)
    harness.wait(store, engine.neighbour.id)
    beside = losses(engine, engine.neighbour)
    alone = engine.start_neighbour(max_steps=len(beside))
    assert harness.wait(store, alone.id).status is JobStatus.SUCCEEDED
    assert len(beside) > 30
    assert beside == pytest.approx(losses(engine, alone), rel=1e-3)
    engine.neighbour = engine.start_neighbour()


def losses(engine: Engine, job: FinetuningJob) -> list[float]:
    return [e["train_loss"] for e in engine.store.metrics_events(job.id) if "train_loss" in e]


@pytest.mark.parametrize(("process", "code"), [
    ("worker", "checkpoint_failed"), ("engine", "store_failed"),
])  # fmt: skip
def test_a_process_that_cannot_write_any_more_serves_on(
    engine: Engine, process: str, code: str
) -> None:
    """A limit on the size of files stands for a full disk: the system refuses to write.

    It hits every job; those of an engine that cannot write are told when it can again.
    """
    job = engine.submit(n_epochs=10_000)
    engine.wait_for_step(job, 3)
    limited = engine.processes[process]
    before = limited.rlimit(psutil.RLIMIT_FSIZE)
    limited.rlimit(psutil.RLIMIT_FSIZE, (4096, before[1]))
    try:
        # Of the engine we hear later.
        engine.serve_until(lambda: process == "engine" or engine.has_ended(job))
    finally:
        limited.rlimit(psutil.RLIMIT_FSIZE, before)
    for failed in (job, engine.neighbour):
        assert engine.failed(failed).code == code
    engine.neighbour = engine.start_neighbour()
    engine.check_others()


def test_a_job_whose_data_has_vanished_fails(engine: Engine) -> None:
    job = engine.submit(n_epochs=10_000)
    engine.store.request_pause(job.id)
    while engine.store.get_job(job.id).status is not JobStatus.PAUSED:
        time.sleep(0.05)
    job.dataset_path.unlink()
    engine.store.resume(job.id)
    assert engine.failed(job).code == "dataset_unreadable"
    engine.check_others()
