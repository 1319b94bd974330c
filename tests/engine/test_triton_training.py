"""Training by the Triton kernels, as on a GPU, in the real engine: in Triton's interpreter, so on
small examples."""

import pytest
from gpu_features import train_by_triton
from models import random_adapter, random_examples, random_model
from test_gradients import MODELS, Engine, assert_equal, reference_gradients


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("triton")
    model = random_model(folder / "model", **MODELS["qwen3-mqa-untied"])
    with pytest.MonkeyPatch.context() as patch:
        # Few blocks: the cache is translated to a GPU's layout at every read.
        engine = Engine(
            model, folder, worker_cls=train_by_triton(patch), kv_cache_memory_bytes=1 << 24,
            activation_cache_tokens=2048,
        )  # fmt: skip
    yield engine
    engine.close()


@pytest.mark.parametrize("policy", ["store", "minimal"])
def test_gradients_equal_peft_autograd(engine: Engine, policy: str) -> None:
    init = random_adapter(engine.model, engine.folder / f"adapter-{policy}")
    examples = random_examples([140, 9, 40])
    expected = reference_gradients(engine, init, examples)
    engine.keep(policy)
    (before,) = engine.llm.collective_rpc("triton_reads")
    assert_equal(engine.one_step(examples, init), expected, 1e-4)
    (after,) = engine.llm.collective_rpc("triton_reads")
    assert after > before
