"""LoRA on a base whose weights are quantised."""

from pathlib import Path

import harness
import pytest
import reference
import torch
from models import quantised_model, random_adapter, random_examples, random_model
from test_gradients import MODELS, Engine

from flexllm_vllm.jobs.types import LoraSpec


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="vLLM's int4 kernel for x86 is in its AVX-512 build alone",
)
def test_gradients_are_those_of_the_rounded_weights(tmp_path: Path) -> None:
    """In bfloat16, the kernel's only dtype: see the test of bfloat16 in ``test_gradients.py``."""
    plain = random_model(tmp_path / "plain", **MODELS["qwen2-gqa-tied"])
    engine = Engine(quantised_model(plain, tmp_path / "quantised"), tmp_path, dtype="bfloat16")
    try:
        assert engine.llm.collective_rpc(harness.on_worker_is_quantised) == [True]
        init = random_adapter(plain, tmp_path / "init")
        examples = random_examples([90, 41])
        engine.train(
            examples, LoraSpec(r=8, lora_alpha=16), init, batch_size=2, n_epochs=1,
            max_grad_norm=0.0,
        )  # fmt: skip
        (got,) = engine.gradients()
    finally:
        engine.close()
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = reference.load_peft(plain, init).to(dtype)
        reference.accumulate(model, examples)
        found[dtype] = reference.lora_tensors(model, "grad")
    expected, usual = found.values()
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        error = reference.relative_error(got[name].double(), exact)
        assert error < 2e-2 + 2 * reference.relative_error(usual[name].double(), exact), name
