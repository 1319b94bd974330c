"""Trouble: a KV cache too small for everyone, resets, pauses, exceptions."""

import time

import harness
import pytest
from models import random_adapter, random_examples, random_model
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import JobStatus, LoraSpec, TrainingSpec


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pressure")
    model = random_model(
        folder / "model", heads=6, kv_heads=2, head_dim=32, inner=320, tied=True, layers=2
    )
    llm = LLM(
        str(model), dtype="float32", max_model_len=512, max_num_seqs=6, served_model_name="base",
        num_gpu_blocks_override=14, kv_cache_memory_bytes=1 << 28, disable_log_stats=False,
        **harness.engine_options(folder / "store", tpot_slo_ms=50.0),
    )  # fmt: skip
    llm.folder, llm.model = folder, model
    yield llm
    llm.llm_engine.engine_core.shutdown()


def preemptions(llm: LLM) -> int:
    return next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def burst(llm: LLM, seed: int) -> tuple[list[list[int]], int]:
    """Requests that need twice the KV cache: their tokens, and how many were preempted."""
    prompts = [{"prompt_token_ids": ids} for ids, _ in random_examples([200] * 6, seed)]
    before = preemptions(llm)
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=150, ignore_eos=True), use_tqdm=False
    )
    return [list(o.outputs[0].token_ids) for o in outputs], preemptions(llm) - before


def test_requests_are_preempted_no_more_often_and_the_job_survives(llm: LLM) -> None:
    tokens, count = burst(llm, seed=5)
    assert count > 0
    llm.reset_prefix_cache()
    store = JobStore(llm.folder / "store")
    training = TrainingSpec(batch_size=2, max_seq_length=512, seed=0, n_epochs=60)
    examples = random_examples([300, 140, 260, 90], seed=2)
    job = harness.submit(store, "base", examples, LoraSpec(r=4, lora_alpha=8), training)
    while store.get_job(job.id).step < 2:
        time.sleep(0.05)
    beside, count_beside = burst(llm, seed=5)
    assert store.get_job(job.id).status is JobStatus.RUNNING
    assert beside == tokens
    assert count_beside == count
    step = store.get_job(job.id).step
    while store.get_job(job.id).step < step + 2:  # it goes on where it was
        time.sleep(0.05)
    store.request_cancel(job.id)
    assert harness.wait(store, job.id).status is JobStatus.CANCELLED


def test_a_dropped_sequence_is_redone_without_changing_the_result(llm: LLM) -> None:
    store = JobStore(llm.folder / "store")
    training = TrainingSpec(
        batch_size=4, max_seq_length=512, seed=0, max_steps=12, learning_rate=1e-3, shuffle=False
    )
    examples = random_examples([300, 140, 260, 90], seed=2)
    lora = LoraSpec(r=4, lora_alpha=8)

    def losses(disturb: bool) -> list[float]:
        job = harness.submit(store, "base", examples, lora, training)
        while disturb and not store.get_job(job.id).status.finished:
            burst(llm, seed=7)
        assert harness.wait(store, job.id).status is JobStatus.SUCCEEDED
        return [s["train_loss"] for s in harness.step_metrics(store, job.id)]

    assert losses(disturb=True) == pytest.approx(losses(disturb=False), rel=1e-4)


@pytest.fixture
def running(llm: LLM):
    """A job that is running during the test."""
    store = JobStore(llm.folder / "store")
    training = TrainingSpec(batch_size=2, max_seq_length=512, seed=0, n_epochs=500)
    examples = random_examples([120, 140, 60, 90], seed=2)
    job = harness.submit(store, "base", examples, LoraSpec(r=4, lora_alpha=8), training)
    while store.get_job(job.id).step < 2:
        time.sleep(0.05)
    yield store, job.id
    if not store.get_job(job.id).status.finished:
        store.request_cancel(job.id)
    harness.wait(store, job.id)


def goes_on(store: JobStore, job_id: str) -> bool:
    """Whether the job does another two steps."""
    step = store.get_job(job_id).step
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if store.get_job(job_id).step >= step + 2:
            return True
        time.sleep(0.05)
    return False


def test_the_prefix_cache_can_be_reset_beside_a_job(llm: LLM, running) -> None:
    assert llm.reset_prefix_cache()
    assert goes_on(*running)


def test_pausing_does_not_wait_for_a_job(llm: LLM, running) -> None:
    core = llm.llm_engine.engine_core
    core.call_utility("pause_scheduler", "abort", True)
    assert core.call_utility("is_scheduler_paused")
    store, job_id = running
    time.sleep(0.5)
    step = store.get_job(job_id).step
    time.sleep(1.0)
    assert store.get_job(job_id).step == step
    core.call_utility("resume_scheduler")
    assert goes_on(*running)


@pytest.mark.parametrize(
    "fault", [harness.on_worker_break_backward, harness.on_worker_break_capture]
)
def test_an_exception_fails_the_job_and_nothing_else(llm: LLM, running, fault) -> None:
    store, job_id = running
    expected, _ = burst(llm, seed=11)
    llm.collective_rpc(fault)
    assert burst(llm, seed=11)[0] == expected
    job = harness.wait(store, job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert "injected" in job.error.message
    again = harness.submit(
        store,
        "base",
        random_examples([30]),
        LoraSpec(r=4, lora_alpha=8),
        TrainingSpec(batch_size=1, max_seq_length=512, seed=0, n_epochs=1),
    )
    assert harness.wait(store, again.id).status is JobStatus.SUCCEEDED
    (slots,) = llm.collective_rpc(harness.on_worker_lora_ids)
    assert not any(slots)


def test_adapters_that_are_served_never_take_the_slot_of_one_in_training(llm: LLM, running) -> None:
    """More of them than there are slots, and than vLLM keeps in memory."""
    [before] = llm.collective_rpc(harness.on_worker_training_slots)
    assert before
    folder = random_adapter(llm.model, llm.folder / "served")
    for int_id in range(1, len(llm.collective_rpc(harness.on_worker_lora_ids)[0]) + 4):
        request = LoRARequest(f"served-{int_id}", int_id, str(folder))
        llm.generate({"prompt_token_ids": [5, 6, 7]}, lora_request=request, use_tqdm=False)
    assert llm.collective_rpc(harness.on_worker_training_slots) == [before]
    assert goes_on(*running)
