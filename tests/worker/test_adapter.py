"""The adapter in training, against torch's own clipping and AdamW, and PEFT's own loader."""

import math
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from flexllm_vllm import checkpoints
from flexllm_vllm.models.base import LORA_GROUPS, MERGED_LORA_GROUPS, LinearShape
from flexllm_vllm.models.parallel import TensorParallel
from flexllm_vllm.plan import SaveAdapter, TrainAdapter
from flexllm_vllm.worker.adapter import TrainableAdapter
from flexllm_vllm.worker.adapter_files import save_adapter
from flexllm_vllm.worker.flat_layout import FlatLayout
from flexllm_vllm.worker.saver import AdapterSaver

ONE_RANK = TensorParallel()
HIDDEN, INNER, KV, LAYERS = 32, 48, 16, 2


class Shapes:
    """The part of a model's backward that an adapter asks for."""

    num_layers = LAYERS
    device = torch.device("cpu")
    lora_groups = LORA_GROUPS

    def __init__(self, parallel: TensorParallel) -> None:
        self.parallel = parallel

    def linear_shapes(self) -> dict[str, LinearShape]:
        return {
            "qkv_proj": LinearShape(HIDDEN, (HIDDEN, KV, KV), "output"),
            "o_proj": LinearShape(HIDDEN, (HIDDEN,), "input"),
            "gate_up_proj": LinearShape(HIDDEN, (INNER, INNER), "output"),
            "down_proj": LinearShape(INNER, (HIDDEN,), "input"),
        }

    def module_path(self, layer: int, name: str) -> str:
        parent = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        return f"model.layers.{layer}.{parent}.{name}"


def make(targets: tuple[str, ...] = ("q_proj", "v_proj", "gate_proj", "down_proj"), r: int = 4,
         init: Path | None = None, seed: int = 3,
         resume_path: str | None = None,
         parallel: TensorParallel = ONE_RANK) -> TrainableAdapter:  # fmt: skip
    spec = TrainAdapter("job", 1, r, 8.0, False, targets, seed, str(init) if init else None,
                        (0.8, 0.95), 1e-6, 0.1, resume_path=resume_path)  # fmt: skip
    return TrainableAdapter(spec, Shapes(parallel))  # type: ignore[arg-type]


def test_steps_equal_torchs_clipping_and_adamw() -> None:
    adapter = make()
    names = list(adapter.matrices())
    reference = [
        torch.nn.Parameter(matrix.clone()) for n in names for matrix in adapter.matrices()[n]
    ]
    optimizer = torch.optim.AdamW(reference, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    torch.manual_seed(0)
    for rate in (1e-2, 5e-3, 1e-3):
        gradients = [torch.randn_like(p) for p in reference]
        flat = [matrix for n in names for matrix in adapter.pack_gradients()[n]]
        for target, gradient, parameter in zip(flat, gradients, reference, strict=True):
            target.add_(gradient)
            parameter.grad = gradient.clone()
        adapter.commit_pack_gradients()
        expected = torch.nn.utils.clip_grad_norm_(reference, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert float(adapter.step(rate, 0.5)) == pytest.approx(float(expected), rel=1e-5)
    got = [matrix for n in names for matrix in adapter.matrices()[n]]
    for matrix, parameter in zip(got, reference, strict=True):
        torch.testing.assert_close(matrix, parameter.detach(), rtol=1e-5, atol=1e-7)


def test_a_discarded_pack_leaves_no_trace() -> None:
    adapter = make()
    for a, b in adapter.pack_gradients().values():
        a.fill_(1.0)
        b.fill_(1.0)
    adapter.discard_pack_gradients()
    adapter.commit_pack_gradients()
    assert all(not a.any() and not b.any() for a, b in adapter.gradients().values())


def test_gradients_that_are_not_finite_change_nothing() -> None:
    adapter = make()
    before = {path: (a.clone(), b.clone()) for path, (a, b) in adapter.matrices().items()}
    next(iter(adapter.pack_gradients().values()))[0].fill_(float("nan"))
    adapter.commit_pack_gradients()
    assert not math.isfinite(adapter.step(1e-3, 1.0))
    for path, (a, b) in adapter.matrices().items():
        assert torch.equal(a, before[path][0])
        assert torch.equal(b, before[path][1])


def test_the_folder_loads_in_peft_with_equal_weights(tmp_path: Path) -> None:
    adapter = make()
    for _, b in adapter.matrices().values():
        b.normal_()
    save_adapter(adapter.snapshot(), tmp_path / "adapter", "base")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    found = dict(loaded.named_parameters())
    for path, (a, b) in adapter.matrices().items():
        prefix = f"base_model.model.{path}"
        assert torch.equal(found[f"{prefix}.lora_A.default.weight"], a)
        assert torch.equal(found[f"{prefix}.lora_B.default.weight"], b)
    again = make(init=tmp_path / "adapter", seed=9)
    for path, (a, b) in adapter.matrices().items():
        assert torch.equal(again.matrices()[path][0], a)
        assert torch.equal(again.matrices()[path][1], b)


def test_an_adapter_of_another_form_is_refused(tmp_path: Path) -> None:
    save_adapter(make().snapshot(), tmp_path / "adapter", "base")
    with pytest.raises(ValueError, match="expected"):
        make(r=8, init=tmp_path / "adapter")
    with pytest.raises(ValueError, match="lacks"):
        make(("q_proj", "k_proj"), init=tmp_path / "adapter")
    with pytest.raises(ValueError, match="also trains"):
        make(("q_proj",), init=tmp_path / "adapter")


def test_a_checkpoint_holds_the_whole_optimizer(tmp_path: Path) -> None:
    def train(adapter: TrainableAdapter, steps: int) -> TrainableAdapter:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            adapter._grads.copy_(torch.randn(adapter._grads.shape, generator=generator))
            adapter.step(1e-2, 1.0)
        return adapter

    first = train(make(), 3)
    save_adapter(first.snapshot(), tmp_path / "step-3", "base", {"step": 3})
    assert checkpoints.read(tmp_path / "step-3").state == {"step": 3}
    second = make(resume_path=str(tmp_path / "step-3"))
    train(first, 2)
    train(second, 2)
    assert torch.equal(first._weights, second._weights)


def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexllm_vllm.worker.adapter_files.save_file", full)
    saver = AdapterSaver()
    saver.save(SaveAdapter("job", str(tmp_path / "step-1"), "base", {}), make())
    assert saver.wait_for_all(10)
    [result] = saver.take_results()
    assert "No space left" in str(result.error)
    assert list(tmp_path.iterdir()) == []
    assert not saver.is_busy


def test_an_adapter_whose_snapshot_is_there_does_not_wait_for_a_slow_disk(tmp_path: Path) -> None:
    disk = threading.Event()
    saver = AdapterSaver(write=lambda *_: disk.wait(30))
    adapter = make()
    for number in range(2):
        order = SaveAdapter("job", str(tmp_path / str(number)), "base")
        saver.save(order, adapter, adapter.snapshot())
    waiting = threading.Thread(target=saver.wait_until_copied, args=(adapter,))
    waiting.start()
    waiting.join(5)
    assert not waiting.is_alive()
    disk.set()
    assert saver.wait_for_all(30)
    assert [result.error for result in saver.take_results()] == [None, None]


class MergedShapes(Shapes):
    """As of Phi-3: q, k and v in one target, gate and up in another."""

    lora_groups = MERGED_LORA_GROUPS

    def linear_shapes(self) -> dict[str, LinearShape]:
        return {
            "qkv_proj": LinearShape(HIDDEN, (HIDDEN + 2 * KV,), "output", ((HIDDEN, KV, KV),)),
            "gate_up_proj": LinearShape(HIDDEN, (2 * INNER,), "output", ((INNER, INNER),)),
            "down_proj": LinearShape(INNER, (HIDDEN,), "input"),
        }


def test_a_merged_target_is_sharded_part_by_part() -> None:
    spec = TrainAdapter("job", 1, 4, 8.0, False, ("qkv_proj", "gate_up_proj", "down_proj"), 0, None,
                        (0.9, 0.999), 1e-8, 0.0)  # fmt: skip
    layouts = [
        FlatLayout(spec, MergedShapes(TensorParallel(rank, 2)))  # type: ignore[arg-type]
        for rank in range(2)
    ]
    whole = torch.arange(layouts[0].whole_size, dtype=torch.float32)
    shards = [layout.shard(whole) for layout in layouts]
    of_rank = layouts[1].groups(shards[1])[0, "qkv_proj"].b[0]
    matrix = FlatLayout(spec, MergedShapes(ONE_RANK)).groups(whole)[0, "qkv_proj"].b[0]  # type: ignore[arg-type]
    q, k, v = matrix.split((HIDDEN, KV, KV))
    assert torch.equal(of_rank, torch.cat([part.chunk(2)[1] for part in (q, k, v)]))

    class Gathered(TensorParallel):
        def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
            return shards

    together = FlatLayout(spec, MergedShapes(Gathered(0, 2)))  # type: ignore[arg-type]
    assert torch.equal(together.gather(shards[0]), whole)
