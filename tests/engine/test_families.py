"""Families beyond those of ``test_gradients.py``, against PEFT autograd."""

from typing import Any

import pytest
from models import random_adapter, random_examples, random_model
from test_gradients import MODELS, TARGETS, Engine, assert_equal, check_any, reference_gradients


@pytest.fixture(
    scope="module",
    params=[
        "phi3-gqa-untied",
        "granite-gqa-tied",
        "gemma2-gqa-tied",
        "gemma3-mqa-tied",
        "mixtral-gqa-untied",
        "qwen3moe-mqa-tied",
    ],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(folder / "model", **MODELS[request.param])
    options: dict[str, Any] = {"activation_policy": "store", "activation_cache_tokens": 512}
    if request.param in TARGETS:
        options["targets"] = TARGETS[request.param]
    # Gemma 3 has norms of heads and of outputs: it captures most. Mixtral's experts are an
    # operation of their own in the graph.
    options["compiled"] = request.param.startswith(("gemma3", "mixtral"))
    engine = Engine(model, folder, **options)
    yield engine
    engine.close()


@pytest.mark.parametrize("policy", ["store", "balanced", "minimal"])
def test_gradients_equal_peft_autograd(engine: Engine, policy: str) -> None:
    init = random_adapter(engine.model, engine.folder / f"all-{policy}", targets=engine.targets)
    examples = random_examples([150, 9, 70])
    expected = reference_gradients(engine, init, examples)
    engine.keep(policy)
    for window in (7, None):
        assert_equal(engine.one_step(examples, init, window), expected, 1e-4)


def test_gradients_of_any_adapter_policy_and_plan(engine: Engine) -> None:
    check_any(engine, 6)
