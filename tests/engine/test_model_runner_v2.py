"""vLLM's model runner V2 with asynchronous scheduling, its default on GPUs, run here through
Triton's interpreter."""

import harness
import pytest
from gpu_features import schedule_asynchronously, use_model_runner_v2
from models import random_adapter, random_examples, random_model
from test_async_scheduling import check_beside_requests
from test_gradients import MODELS, Engine, assert_equal, reference_gradients


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
    check_beside_requests(engine, "5", 8)
