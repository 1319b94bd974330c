"""Gradients and training through the real engine, against PEFT autograd.

The reference runs in float64: on CPU float32 autograd itself is up to 3e-4 away from it.
"""

import random
from pathlib import Path
from typing import Any

import harness
import pytest
import reference
import torch
from models import ALL_TARGETS, first_layers, random_adapter, random_examples, random_model
from safetensors.torch import load_file
from vllm import LLM

from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import JobStatus, LoraSpec, TrainingSpec

MODELS = {
    "llama-mha-untied": {
        "family": "llama", "heads": 4, "kv_heads": 4, "head_dim": 32, "inner": 224, "tied": False,
        # Llama 3.1's, at a length within the tests'.
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    # Biases of q, k and v.
    "qwen2-gqa-tied": {
        "family": "qwen2", "heads": 6, "kv_heads": 2, "head_dim": 32, "inner": 320, "tied": True,
    },
    # Norms of queries and keys, which are wider than the residual stream.
    "qwen3-mqa-untied": {
        "family": "qwen3", "heads": 4, "kv_heads": 1, "head_dim": 64, "inner": 512, "tied": False,
        "hidden": 192,
    },
    "mistral-gqa-tied": {
        "family": "mistral", "heads": 6, "kv_heads": 2, "head_dim": 32, "inner": 320, "tied": True,
    },
    # One linear for q, k and v, one for gate and up; half of a head turned, by LongRoPE's table.
    "phi3-gqa-untied": {
        "family": "phi3", "heads": 6, "kv_heads": 2, "head_dim": 32, "inner": 320, "tied": False,
        "partial_rotary_factor": 0.5, "original_max_position_embeddings": 4,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5,
            "short_factor": [1.0] * 8, "long_factor": [1.0 + i / 4 for i in range(8)],
            "original_max_position_embeddings": 4,
        },
    },
    # What is added to the residual stream is scaled, and so are scores and logits.
    "granite-gqa-tied": {
        "family": "granite", "heads": 6, "kv_heads": 2, "head_dim": 32, "inner": 320, "tied": True,
        "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 3.0,
        "embedding_multiplier": 12.0,
    },
    # Norms before the residual stream, GeGLU, soft caps, a sliding window in every second layer.
    "gemma2-gqa-tied": {
        "family": "gemma2", "heads": 4, "kv_heads": 2, "head_dim": 32, "inner": 320, "tied": True,
        "hidden": 192, "sliding_window": 24, "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    # The same without caps; norms of heads, two rotary embeddings.
    "gemma3-mqa-tied": {
        "family": "gemma3_text", "heads": 4, "kv_heads": 1, "head_dim": 64, "inner": 320,
        "tied": True, "hidden": 192, "sliding_window": 24, "query_pre_attn_scalar": 48,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0},
        },
    },
    # Experts, whose width vLLM pads; routing weights that sum to one.
    "mixtral-gqa-untied": {
        "family": "mixtral", "heads": 6, "kv_heads": 2, "head_dim": 32, "inner": 80, "tied": False,
        "num_local_experts": 6, "num_experts_per_tok": 2,
    },
    # Routing weights that do not; an MLP in the second layer, norms of heads.
    "qwen3moe-mqa-tied": {
        "family": "qwen3_moe", "heads": 4, "kv_heads": 1, "head_dim": 64, "inner": 320,
        "tied": True, "hidden": 192, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "mlp_only_layers": [1], "norm_topk_prob": False,
    },
}  # fmt: skip


# What an adapter on all linears covers, where it is not what it is for Llama.
TARGETS = {
    "phi3-gqa-untied": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "mixtral-gqa-untied": ALL_TARGETS[:4],
    "qwen3moe-mqa-tied": ALL_TARGETS[:4],
}


class Engine:
    """An engine with a store, for one model.

    Attributes:
        targets: the linears that an adapter on all of them covers.
    """

    def __init__(self, model: Path, folder: Path, dtype: str = "float32", **options: Any) -> None:
        self.model = model
        self.targets = options.pop("targets", ALL_TARGETS)
        self.folder = folder
        self.store = JobStore(folder / "store")
        flags = {
            "scheduler_cls": options.pop("scheduler_cls", "window_scheduler.WindowScheduler"),
            "enforce_eager": not options.pop("compiled", False),
            "quantization": options.pop("quantization", None),
            **({"worker_cls": options.pop("worker_cls")} if "worker_cls" in options else {}),
        }
        self.llm = LLM(
            str(model),
            dtype=dtype,
            max_model_len=512,
            max_num_seqs=4,
            served_model_name="base",
            kv_cache_memory_bytes=options.pop("kv_cache_memory_bytes", 1 << 28),
            seed=0,
            tensor_parallel_size=options.pop("tensor_parallel_size", 1),
            **{**harness.engine_options(folder / "store", **options), **flags},
        )
        self.llm.collective_rpc(harness.on_worker_record_gradients)

    def train(self, examples: Any, lora: LoraSpec, init: Path | None = None,
              metadata: dict[str, str] | None = None, **training: Any) -> Any:  # fmt: skip
        spec = TrainingSpec(**{"max_seq_length": 512, "seed": 0, "shuffle": False, **training})
        job = harness.submit(self.store, "base", examples, lora, spec, init, metadata)
        job = harness.wait(self.store, job.id)
        assert job.status is JobStatus.SUCCEEDED, job.error
        return job

    def keep(self, policy: str, dtype: str = "auto") -> None:
        self.llm.collective_rpc(harness.on_worker_keep, args=(policy, dtype))

    def gradients(self) -> list[dict[str, torch.Tensor]]:
        """Of each step since the last call, by ``"<path>.A"`` and ``"<path>.B"``."""
        path = self.folder / "gradients.pt"
        self.llm.collective_rpc(harness.on_worker_save_gradients, args=(str(path),))
        self.llm.collective_rpc(harness.on_worker_record_gradients)
        return [
            {f"{name}.{letter}": pair[i] for name, pair in step.items() for i, letter in
             enumerate("AB")}
            for step in torch.load(path)
        ]  # fmt: skip

    def one_step(
        self, examples: Any, init: Path, window: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Gradients of one batch of the examples, in windows of a size or of the scheduler's."""
        metadata = {"window": str(window)} if window else None
        lora = LoraSpec(r=8, lora_alpha=16, target_modules=self.targets)
        self.train(
            examples, lora, init, metadata, batch_size=len(examples), n_epochs=1, max_grad_norm=0.0
        )
        (got,) = self.gradients()
        return got

    def close(self) -> None:
        self.store.close()
        self.llm.llm_engine.engine_core.shutdown()


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float):
    assert got.keys() == expected.keys()
    errors = {k: reference.relative_error(got[k].double(), expected[k]) for k in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < bound, f"{worst}: {errors[worst]:.2e}"


@pytest.fixture(scope="module", params=list(MODELS)[:3])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    # A small cache, so that batches need several packs.
    options = {"activation_policy": "store", "activation_cache_tokens": 512}
    if request.param == "llama-mha-untied":
        options |= {"base_weights": "one-copy", "compiled": True}
    engine = Engine(random_model(folder / "model", **MODELS[request.param]), folder, **options)
    yield engine
    engine.close()


def reference_gradients(engine: Engine, adapter: Path, examples: Any) -> dict[str, torch.Tensor]:
    model = reference.load_peft(engine.model, adapter).double()
    reference.accumulate(model, examples)
    return reference.lora_tensors(model, "grad")


def test_gradients_equal_peft_autograd_whatever_the_windows(engine: Engine) -> None:
    init = random_adapter(engine.model, engine.folder / "all")
    examples = random_examples([150, 9, 70])
    expected = reference_gradients(engine, init, examples)
    engine.keep("balanced")
    for window in (1, 7, 64, None):
        assert_equal(engine.one_step(examples, init, window), expected, 1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("o_proj", "up_proj")])
def test_gradients_of_a_subset_of_targets(engine: Engine, targets: tuple[str, ...]) -> None:
    init = random_adapter(engine.model, engine.folder / "-".join(targets), 4, targets)
    examples = random_examples([40, 33], seed=1)
    expected = reference_gradients(engine, init, examples)
    lora = LoraSpec(r=4, lora_alpha=8, target_modules=targets)
    engine.train(examples, lora, init, batch_size=2, n_epochs=1, max_grad_norm=0.0)
    (got,) = engine.gradients()
    assert_equal(got, expected, 1e-4)


def test_gradients_of_any_adapter_policy_and_plan(engine: Engine) -> None:
    check_any(engine, 9)


def check_any(engine: Engine, num_cases: int) -> None:
    """Sequences, targets, layers, policies and windows drawn at random, and a batch of more packs
    than one, all at once."""
    rng = random.Random(engine.model.parent.name)
    for case in range(num_cases):
        targets = tuple(rng.sample(engine.targets, rng.randint(1, len(engine.targets))))
        layers = sorted(rng.sample(range(3), rng.randint(1, 3)))
        policy = ("store", "balanced", "minimal")[case % 3]
        examples = random_examples([rng.randint(5, 200) for _ in range(rng.randint(1, 7))], case)
        init = random_adapter(engine.model, engine.folder / f"case{case}", 4, targets, case, layers)
        expected = reference_gradients(engine, init, examples)
        lora = LoraSpec(r=4, lora_alpha=8, target_modules=targets, layers_to_transform=layers)
        engine.keep(policy)
        engine.train(
            examples, lora, init, {"window": "random"}, batch_size=7, n_epochs=1, max_grad_norm=0.0
        )
        (got,) = engine.gradients()
        assert_equal(got, expected, 1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("int8", 3e-2)])
def test_compressed_activations_cost_what_the_documentation_says(
    engine: Engine, dtype: str, bound: float
) -> None:
    init = random_adapter(engine.model, engine.folder / dtype)
    examples = random_examples([150, 9, 70])
    expected = reference_gradients(engine, init, examples)
    for policy in ("store", "balanced", "minimal"):
        engine.keep(policy, dtype)
        engine.train(
            examples, LoraSpec(r=8, lora_alpha=16), init, batch_size=3, n_epochs=1,
            max_grad_norm=0.0,
        )  # fmt: skip
        (got,) = engine.gradients()
        assert_equal(got, expected, bound)
    engine.keep("balanced")


def test_only_forwards_with_adapter_rows_leave_the_graph_of_the_base_model(engine: Engine) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    if not engine.llm.collective_rpc(harness.on_worker_record_paths)[0]:
        return  # one of the engines is compiled
    served = LoRARequest("served", 1, str(random_adapter(engine.model, engine.folder / "served")))
    params = SamplingParams(max_tokens=4, temperature=0)

    def paths() -> set[str]:
        return set(engine.llm.collective_rpc(harness.on_worker_take_paths)[0])

    prompt: Any = {"prompt_token_ids": [5, 6, 7]}
    engine.llm.generate(prompt, params, use_tqdm=False)
    assert paths() == {"base"}
    engine.llm.generate(prompt, params, use_tqdm=False, lora_request=served)
    assert paths() == {"with adapters"}
    engine.llm.generate([prompt] * 2, params, use_tqdm=False, lora_request=[None, served])
    assert "layers" not in paths()
    engine.train(random_examples([20]), LoraSpec(r=8, lora_alpha=16), batch_size=1, n_epochs=1)
    engine.gradients()
    trained = paths()
    assert "with adapters" in trained
    assert "layers" not in trained


def test_a_fresh_adapter_starts_as_peft_starts_it(engine: Engine) -> None:
    lora = LoraSpec(r=8, lora_alpha=16)
    job = engine.train(random_examples([20]), lora, batch_size=1, n_epochs=1, learning_rate=0.0)
    engine.gradients()
    tensors = load_file(job.adapter_path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_A" in name:
            bound = tensor.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt(5): 1 / sqrt(in)
            assert 0.9 * bound < tensor.abs().max() <= bound
        else:
            assert not tensor.any()


def test_gradients_with_a_sliding_window(tmp_path: Path) -> None:
    """vLLM gives KV blocks back that have left the window; the backward still reads them."""
    model = random_model(tmp_path / "model", **MODELS["mistral-gqa-tied"], sliding_window=40)
    engine = Engine(model, tmp_path)
    try:
        init = random_adapter(engine.model, tmp_path / "init")
        examples = random_examples([400, 130, 9])
        expected = reference_gradients(engine, init, examples)
        for policy, window in (("store", 64), ("minimal", None)):
            engine.keep(policy)
            assert_equal(engine.one_step(examples, init, window), expected, 1e-4)
    finally:
        engine.close()


def test_bfloat16_gradients_point_where_the_exact_ones_do(tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: some per cent on each matrix is its rounding, how many depends on the
    processor's GEMM. PEFT's own autograd in bfloat16 tells what is usual on this one."""
    engine = Engine(
        random_model(tmp_path / "model", **MODELS["mistral-gqa-tied"]), tmp_path, dtype="bfloat16"
    )
    try:
        init = random_adapter(engine.model, tmp_path / "init")
        examples = random_examples([90, 41])
        expected = reference_gradients(engine, init, examples)
        lora = LoraSpec(r=8, lora_alpha=16)
        engine.train(examples, lora, init, batch_size=2, n_epochs=1, max_grad_norm=0.0)
        (got,) = engine.gradients()
    finally:
        engine.close()
    rounded = reference.load_peft(engine.model, init).bfloat16()
    reference.accumulate(rounded, examples)
    usual = reference.lora_tensors(rounded, "grad")
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        error = reference.relative_error(got[name].double(), exact)
        assert error < 2e-2 + 2 * reference.relative_error(usual[name].double(), exact), name


def test_twenty_steps_follow_peft(demo_model: Path, tmp_path: Path) -> None:
    """With real weights, of a third of the layers: the reference is in float64."""
    model_path = first_layers(demo_model, tmp_path / "model", 10)
    engine = Engine(model_path, tmp_path)
    try:
        init = random_adapter(model_path, tmp_path / "init", r=4)
        examples = random_examples([24, 40, 31, 18, 52, 27], seed=3, vocab=40_000)
        job = engine.train(
            examples,
            LoraSpec(r=4, lora_alpha=8, target_modules=ALL_TARGETS),
            init,
            batch_size=3,
            max_steps=20,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_ratio=0.1,
            max_grad_norm=1.0,
            weight_decay=0.01,
        )
        steps = harness.step_metrics(engine.store, job.id)
        first = engine.gradients()[0]
    finally:
        engine.close()
    model = reference.load_peft(model_path, init).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    from transformers import get_scheduler

    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=20)
    assert [s["step"] for s in steps] == list(range(1, 21))
    for index, step in enumerate(steps):
        start = 3 * (index % 2)
        loss = reference.accumulate(model, examples[start : start + 3])
        if index == 0:
            # The engine multiplies the gradients by the clipping factor after they are recorded.
            assert_equal(first, reference.lora_tensors(model, "grad"), 1e-4)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        assert step["train_loss"] == pytest.approx(loss, rel=1e-3)
        assert step["grad_norm"] == pytest.approx(float(norm), rel=1e-2)
        assert step["learning_rate"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tensors = load_file(job.adapter_path / "adapter_model.safetensors")
    final = {
        f"{key[:-2]}.{key[-1]}": tensors[f"base_model.model.{key[:-2]}.lora_{key[-1]}.weight"]
        for key in reference.lora_tensors(model, "data")
    }
    assert_equal(final, reference.lora_tensors(model, "data"), 1e-3)
