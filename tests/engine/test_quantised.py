"""LoRA on a base whose weights are quantised, against PEFT on the rounded weights.

In bfloat16, as vLLM has them: see the test of bfloat16 in ``test_gradients.py``. A number that lies
between two that eight bits can express may become either: so far are we away.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import reference
import torch
from models import random_adapter, random_examples, random_model
from quantised_models import (
    awq_model,
    compressed_tensors_model,
    gptq_model,
    round_to_fp8,
    to_fp8,
)
from test_gradients import MODELS, Engine


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="vLLM's int4 kernel for x86 is in its AVX-512 build alone",
)
@pytest.mark.parametrize("quantise", [compressed_tensors_model, gptq_model, awq_model])
def test_four_bits(quantise: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    plain = random_model(tmp_path / "plain", **MODELS["qwen2-gqa-tied"])
    check(plain, quantise(plain, tmp_path / "quantised"), tmp_path, "bfloat16")


def test_fp8_inputs_rounded_too(tmp_path: Path) -> None:
    plain = random_model(tmp_path / "plain", **MODELS["qwen2-gqa-tied"])
    round_to_fp8(plain)
    check(plain, plain, tmp_path, "bfloat16", to_fp8, quantization="fp8_per_channel")


def check(
    plain: Path,
    model: Path,
    folder: Path,
    dtype: str,
    rounded: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """Trains on ``model``, whose weights are those of ``plain``."""
    engine = Engine(model, folder, dtype=dtype, **options)
    try:
        assert engine.llm.collective_rpc(harness.on_worker_is_quantised) == [True]
        init = random_adapter(plain, folder / "init")
        examples = random_examples([90, 41])
        got = engine.one_step(examples, init)
    finally:
        engine.close()
    exact, usual = (
        gradients(plain, init, examples, wanted, rounded)
        for wanted in (torch.float64, getattr(torch, dtype))
    )
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        error = reference.relative_error(got[name].double(), expected)
        assert error < 2e-2 + 2 * reference.relative_error(usual[name].double(), expected), name


def gradients(
    plain: Path, init: Path, examples: Any, dtype: torch.dtype, rounded: Any
) -> dict[str, torch.Tensor]:
    model = reference.load_peft(plain, init).to(dtype)
    if rounded is not None:
        reference.round_inputs(model, rounded)
    reference.accumulate(model, examples)
    return reference.lora_tensors(model, "grad")
