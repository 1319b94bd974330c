"""Merges against ``add_weighted_adapter`` on the model itself, and against the sum of products."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_adapters import TARGETS, TINY_LLAMA, logits, save_random_adapter, tiny_llama
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from flexllm_vllm.adapter_files.base_linears import base_linears
from flexllm_vllm.adapter_files.check import check_adapter
from flexllm_vllm.adapter_files.merge_job import MergeJob
from flexllm_vllm.adapter_files.merging import merge

BASE = base_linears(TINY_LLAMA)
Deltas = dict[str, torch.Tensor]


def job(folder: Path, paths: list[Path], weights: list[float], method: str, **options: Any) -> Path:
    """Merge; returns the folder of the result."""
    result = folder / "merged"
    result.mkdir()
    settings = {"density": None, "svd_rank": None, "majority_sign_method": "total", "seed": 3}
    merge_job = MergeJob(
        paths=[str(path) for path in paths],
        weights=weights,
        method=method,
        modules=BASE.paths(),
        num_layers=BASE.num_layers,
        result=str(result),
        **{**settings, **options},
    )
    merge_job.write(folder / "job.json")
    merge(MergeJob.read(folder / "job.json"))
    check_adapter(result, BASE, 64)
    return result


def deltas(model: PeftModel, adapter: str) -> Deltas:
    """What an adapter adds to each weight."""
    return {
        name: module.get_delta_weight(adapter)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A
    }


def vllm_deltas(folder: Path) -> Deltas:
    """The same, as vLLM loads the adapter."""
    helper = PEFTHelper.from_local_dir(str(folder), None)
    model = LoRAModel.from_local_checkpoint(
        str(folder), set(TARGETS), helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    return {
        name: lora.lora_b @ lora.lora_a * lora.scaling
        for name, lora in model.loras.items()
        if lora.lora_a is not None and lora.lora_b is not None
    }


def loaded(paths: list[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(tiny_llama(), str(paths[0]), adapter_name="0")
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(str(path), adapter_name=str(i))
    return model


def assert_equal(found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {"svd_rank": 6}),
        ("svd", {}),
        ("ties", {"density": 0.6}),
        ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
        ("ties_svd", {"density": 0.6, "svd_rank": 5}),
        ("dare_linear", {"density": 0.7}),
        ("dare_linear_svd", {"density": 0.7}),
        ("dare_ties", {"density": 0.7}),
        ("dare_ties_svd", {"density": 0.7}),
        ("magnitude_prune", {"density": 0.5}),
        ("magnitude_prune_svd", {"density": 0.5}),
    ],
)
def test_a_merge_is_what_peft_makes_on_the_model(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    paths = [
        save_random_adapter(tmp_path / "a", seed=1),
        save_random_adapter(
            tmp_path / "b", seed=2, lora_alpha=12, target_modules=["q_proj", "up_proj"]
        ),
    ]
    result = job(tmp_path, paths, [0.8, -0.3], method, **options)

    reference = loaded(paths)
    torch.manual_seed(3)
    reference.base_model.add_weighted_adapter(
        ["0", "1"], [0.8, -0.3], "merged", combination_type=method, **options
    )
    assert_equal(deltas(loaded([result]), "0"), deltas(reference, "merged"))
    reference.set_adapter("merged")
    with torch.no_grad():
        expected = reference(torch.arange(16)[None]).logits
    torch.testing.assert_close(logits(result), expected, rtol=1e-3, atol=1e-4)


def test_different_adapters_are_summed(tmp_path: Path) -> None:
    """Ranks, scalings, targets and layers of their own: PEFT alone would take some of the first."""
    paths = [
        save_random_adapter(
            tmp_path / "a", 1, use_rslora=True, layers_to_transform=[1], target_modules=["q_proj"]
        ),
        save_random_adapter(tmp_path / "b", 2, r=6, target_modules=["v_proj", "q_proj"]),
        save_random_adapter(
            tmp_path / "c", 3, r=2, rank_pattern={"k_proj": 5}, alpha_pattern={"o_proj": 3},
            use_rslora=True, target_modules=["k_proj", "o_proj"],
        ),
    ]  # fmt: skip
    weights = [0.5, 2.0, -1.0]
    result = job(tmp_path, paths, weights, "cat")
    model = loaded(paths)
    expected: Deltas = {}
    for i, weight in enumerate(weights):
        for name, delta in deltas(model, str(i)).items():
            expected[name] = expected.get(name, torch.zeros_like(delta)) + weight * delta
    assert_equal(deltas(loaded([result]), "0"), expected)
    assert_equal(
        {f"base_model.model.{name}": delta for name, delta in vllm_deltas(result).items()}, expected
    )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, (["q_proj", "v_proj"], None)), ([1], (["q_proj", "v_proj"], [1]))],
)
def test_the_result_names_its_modules_as_others_do(
    tmp_path: Path, layers: list[int] | None, expected: Any
) -> None:
    paths = [
        save_random_adapter(
            tmp_path / str(i), i, target_modules=["v_proj", "q_proj"], layers_to_transform=layers
        )
        for i in range(2)
    ]
    result = job(tmp_path, paths, [1, 1], "linear")
    config = json.loads((result / "adapter_config.json").read_text())
    assert (sorted(config["target_modules"]), config["layers_to_transform"]) == expected
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["base_model_name_or_path"] == "org/tiny"


def test_what_peft_cannot_merge_is_its_error(tmp_path: Path) -> None:
    paths = [save_random_adapter(tmp_path / str(r), r=r) for r in (2, 4)]
    with pytest.raises(ValueError, match="same r value"):
        job(tmp_path, paths, [1, 1], "linear")
