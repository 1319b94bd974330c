"""vLLM's model runner V2 with asynchronous scheduling, its default on GPUs, run here through
Triton's interpreter."""

from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
from gpu_features import schedule_asynchronously, use_model_runner_v2
from models import random_adapter, random_examples, random_model
from test_gradients import MODELS, Engine, assert_equal, reference_gradients
from vllm import SamplingParams

from flexllm_vllm.jobs.types import LoraSpec


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("v2")
    model = random_model(folder / "model", **MODELS["qwen2-gqa-tied"])
    with pytest.MonkeyPatch.context() as patch:
        use_model_runner_v2(patch)
        engine = Engine(model, folder, scheduler_cls=schedule_asynchronously(patch))
    yield engine
    engine.close()


def test_gradients_equal_peft_autograd(engine: Engine) -> None:
    assert engine.llm.collective_rpc(harness.on_worker_runner) == [
        "vllm.v1.worker.cpu.model_runner"
    ]
    init = random_adapter(engine.model, engine.folder / "adapter")
    examples = random_examples([90, 9, 40])
    expected = reference_gradients(engine, init, examples)
    for window in (7, None):
        assert_equal(engine.one_step(examples, init, window), expected, 1e-4)


def test_requests_and_gradients_are_right_in_one_batch(engine: Engine) -> None:
    """Rows of both kinds in an order that is V2's own."""
    init = random_adapter(engine.model, engine.folder / "beside", seed=4)
    examples = random_examples([60, 9, 40], seed=3)
    expected = reference_gradients(engine, init, examples)
    prompts = [{"prompt_token_ids": ids} for ids, _ in random_examples([5, 30, 17], seed=8)]
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def answers() -> list[list[int]]:
        outputs = engine.llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    quiet = answers()
    engine.gradients()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            engine.train, examples, LoraSpec(r=8, lora_alpha=16), init, {"window": "5"},
            batch_size=3, n_epochs=8, max_grad_norm=0.0, learning_rate=1e-12,
        )  # fmt: skip
        beside = []
        while not job.done():
            beside.append(answers())
        job.result()
    assert len(beside) > 1
    assert all(found == quiet for found in beside)
    steps = engine.gradients()
    assert len(steps) == 8  # which hardly move the weights
    for got in steps:
        assert_equal(got, expected, 1e-4)
