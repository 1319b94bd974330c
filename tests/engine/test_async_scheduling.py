"""vLLM's asynchronous scheduling, its default on GPUs: each iteration is planned before the results
of the last are known."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from gpu_features import schedule_asynchronously
from models import random_adapter, random_examples, random_model
from test_gradients import MODELS, Engine, assert_equal, reference_gradients
from vllm import SamplingParams

from flexllm_vllm.jobs.types import LoraSpec


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("async")
    model = random_model(folder / "model", **MODELS["qwen2-gqa-tied"])
    with pytest.MonkeyPatch.context() as patch:
        scheduler = schedule_asynchronously(patch)
        engine = Engine(model, folder, scheduler_cls=scheduler, activation_cache_tokens=512)
    yield engine
    engine.close()


@pytest.mark.parametrize("window", [7, None])
def test_gradients_equal_peft_autograd(engine: Engine, window: int | None) -> None:
    init = random_adapter(engine.model, engine.folder / f"adapter-{window}")
    examples = random_examples([150, 9, 70, 200, 31])
    expected = reference_gradients(engine, init, examples)
    assert_equal(engine.one_step(examples, init, window), expected, 1e-4)


def test_requests_and_gradients_are_right_beside_each_other(engine: Engine) -> None:
    check_beside_requests(engine, "random", 30)
    stats = engine.llm.llm_engine.engine_core.call_utility("finetuning_stats")
    assert stats["most_in_flight"] == 2


def check_beside_requests(engine: Engine, window: str, n_epochs: int) -> None:
    """Gradients of a job beside requests, whose tokens stay as they were."""
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
            engine.train, examples, LoraSpec(r=8, lora_alpha=16), init, {"window": window},
            batch_size=3, n_epochs=n_epochs, max_grad_norm=0.0, learning_rate=1e-12,
        )  # fmt: skip
        beside = []
        while not job.done():
            beside.append(answers())
        job.result()
    assert len(beside) > 1
    assert all(found == quiet for found in beside)
    steps = engine.gradients()
    assert len(steps) == n_epochs  # which hardly move the weights
    for got in steps:
        assert_equal(got, expected, 1e-4)
