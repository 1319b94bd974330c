"""What surrounds the gradients, in the real engine: evaluation, DPO, checkpoints, pausing."""

import json
import random
import time
from pathlib import Path
from typing import Any

import harness
import pytest
import reference
import torch
from models import ALL_TARGETS, random_adapter, random_examples, random_model
from safetensors.torch import load_file
from test_gradients import MODELS, Engine, assert_equal, reference_gradients
from toy_tokenizer import CHATML, toy_tokenizer
from trl_reference import TrlBatch, dpo_batch
from vllm import SamplingParams

from flexllm_vllm import checkpoints
from flexllm_vllm.data import ExampleTokenizer, tokenize_preferences
from flexllm_vllm.jobs.types import JobStatus, LoraSpec, TrainingSpec

LORA = LoraSpec(r=8, lora_alpha=16)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("training")
    model = random_model(folder / "model", **MODELS["qwen2-gqa-tied"])
    engine = Engine(model, folder, activation_cache_tokens=1024, checkpoint_interval_s=0.2,
                    max_jobs=3)  # fmt: skip
    yield engine
    engine.close()


def submit(
    engine: Engine, examples: Any, init: Path | None = None, lora: LoraSpec = LORA, **options: Any
) -> Any:
    training = {"max_seq_length": 512, "seed": 0, "shuffle": False, "max_grad_norm": 0.0}
    parts = {name: options.pop(name) for name in ("validation", "method") if name in options}
    spec = TrainingSpec(**{**training, **options})
    return harness.submit(engine.store, "base", examples, lora, spec, init, **parts)


def finish(engine: Engine, job: Any) -> Any:
    job = harness.wait(engine.store, job.id)
    assert job.status is JobStatus.SUCCEEDED, job.error
    return job


def metrics(engine: Engine, job: Any, name: str) -> list[float]:
    return [event[name] for event in engine.store.metrics_events(job.id) if name in event]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def valid_metrics(model: Any, examples: Any) -> tuple[float, float]:
    """Mean loss and token accuracy of the examples, by transformers."""
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for ids, mask in examples:
            loss += float(reference.loss_sum(model, (ids, mask)))
            best = model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
            bearing = torch.tensor(mask[1:]).bool()
            correct += int((best == torch.tensor(ids[1:]))[bearing].sum())
            count += int(bearing.sum())
    return loss / count, correct / count


def test_an_evaluation_has_the_loss_and_accuracy_of_peft(engine: Engine) -> None:
    init = random_adapter(engine.model, engine.folder / "evaluated")
    examples = random_examples([60, 90, 40, 70])
    validation = random_examples([120, 35, 64, 9, 50] * 4, seed=3)
    # An overfitted example among them: some tokens are predicted right.
    validation += examples
    job = submit(engine, examples, init, validation=validation, batch_size=2, n_epochs=6,
                 learning_rate=0.02, eval_steps=5)  # fmt: skip
    job = finish(engine, job)
    assert [e["step"] for e in engine.store.metrics_events(job.id) if "valid_loss" in e] == [
        5, 10, 12,
    ]  # fmt: skip
    loss, accuracy = valid_metrics(reference.load_peft(engine.model, job.adapter_path), validation)
    assert metrics(engine, job, "valid_loss")[-1] == pytest.approx(loss, rel=1e-4)
    assert metrics(engine, job, "valid_mean_token_accuracy")[-1] == pytest.approx(
        accuracy, abs=2e-3
    )
    assert accuracy > 0.01
    [newest, *_] = engine.store.list_checkpoints(job.id)[0]
    assert newest.metrics["full_valid_loss"] == pytest.approx(loss, rel=1e-4)
    results = engine.store.files.path(engine.store.get_job(job.id).result_file).read_text()
    assert len(results.splitlines()) == 13
    assert results.startswith("step,train_loss,train_mean_token_accuracy,valid_loss")


def test_training_stops_early_and_keeps_the_best(engine: Engine) -> None:
    examples, validation = random_examples([50] * 8), random_examples([50] * 4, seed=9)
    job = submit(engine, examples, validation=validation, batch_size=4, n_epochs=50,
                 learning_rate=0.05, eval_steps=1, early_stopping_patience=3,
                 load_best_model_at_end=True, lr_scheduler_type="constant")  # fmt: skip
    job = finish(engine, job)
    losses = metrics(engine, job, "valid_loss")
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 3 < 100
    model = reference.load_peft(engine.model, job.adapter_path)
    assert valid_metrics(model, validation)[0] == pytest.approx(min(losses), rel=1e-4)
    messages = [e.message for e in engine.store.list_events(job.id, limit=100)[0]]
    assert any("stops early" in message for message in messages)


def logp(model: Any, example: Any) -> torch.Tensor:
    return -reference.loss_sum(model, example)


def dpo_loss(model: Any, pairs: list[Any], beta: float) -> torch.Tensor:
    """Equation 7 of the paper, the reference being the model without its adapter."""
    total = torch.tensor(0.0, dtype=torch.float64)
    for chosen, rejected in pairs:
        with torch.no_grad(), model.disable_adapter():
            base = logp(model, chosen) - logp(model, rejected)
        margin = beta * (logp(model, chosen) - logp(model, rejected) - base)
        total = total - torch.nn.functional.logsigmoid(margin).double()
    return total / len(pairs)


@pytest.mark.parametrize("window", [None, 7])
def test_preferences_have_the_gradients_of_dpo(engine: Engine, window: int | None) -> None:
    init = random_adapter(engine.model, engine.folder / f"dpo{window}")
    # Longer than a pack: pairs stay together.
    examples = random_examples([90, 60, 200, 230, 33, 70], seed=5)
    pairs = [(examples[i], examples[i + 1]) for i in (0, 2, 4)]
    model = reference.load_peft(engine.model, init).double()
    loss = dpo_loss(model, pairs, 0.3)
    loss.backward()
    expected = reference.lora_tensors(model, "grad")
    engine.gradients()
    metadata = {"window": str(window)} if window else None
    spec = TrainingSpec(batch_size=3, n_epochs=1, max_seq_length=512, seed=0, shuffle=False,
                        max_grad_norm=0.0, beta=0.3)  # fmt: skip
    job = harness.submit(
        engine.store, "base", examples, LORA, spec, init, metadata,
        validation=examples, method="dpo",
    )  # fmt: skip
    job = finish(engine, job)
    [step] = engine.gradients()
    assert_equal(step, expected, 1e-4)
    assert metrics(engine, job, "train_loss")[0] == pytest.approx(float(loss.detach()), rel=1e-4)
    trained = reference.load_peft(engine.model, job.adapter_path).double()
    with torch.no_grad():
        after = float(dpo_loss(trained, pairs, 0.3))
    assert metrics(engine, job, "valid_loss")[0] == pytest.approx(after, rel=1e-4)


# A line break before a turn instead of behind its end, which TRL counts as part of the answer.
CHATML_BREAK_BEFORE = (
    "{% for message in messages %}"
    "\n<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
PAIRS = [
    ("How cold is it?", "About 12 degrees.", "Not very."),
    ("Hi", "Hello! What can I do for you?", "What?"),
    ("Name a colour of the sea, and say when it has it.", "Grey", "Green, at noon, off Brest"),
]


def with_trl(engine: Engine, init: Path, template: str) -> tuple[TrlBatch, list[Any]]:
    """TRL's batch of the pairs, and our examples of them (preferred and other in turn)."""
    tokenizer = toy_tokenizer(template)
    tokenizer.pad_token = tokenizer.eos_token
    said = [
        (
            [{"role": "user", "content": asked}],
            *([{"role": "assistant", "content": a}] for a in two),
        )
        for asked, *two in PAIRS
    ]
    batch = dpo_batch(engine.model, init, tokenizer, said, 0.3, engine.folder / "trl")
    file = engine.folder / "pairs.jsonl"
    lines = [
        {"input": {"messages": prompt}, "preferred_output": one, "non_preferred_output": other}
        for prompt, one, other in said
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    dataset, _ = tokenize_preferences(file, ExampleTokenizer(toy_tokenizer(template)), 512)
    return batch, [dataset.example(i) for i in range(len(dataset))]


def test_preferences_have_the_gradients_of_trl(engine: Engine) -> None:
    """From the same file on: its templates, masks, loss and reference."""
    init = random_adapter(engine.model, engine.folder / "trl-init")
    batch, examples = with_trl(engine, init, CHATML_BREAK_BEFORE)
    assert sorted(examples) == sorted(batch.examples)
    engine.gradients()
    job = submit(engine, examples, init, method="dpo", beta=0.3, batch_size=3, n_epochs=1)
    job = finish(engine, job)
    [step] = engine.gradients()
    assert_equal(step, batch.gradients, 1e-4)
    assert metrics(engine, job, "train_loss") == pytest.approx([batch.loss], rel=1e-4)
    assert len(batch.rewards) == 4
    for name, value in batch.rewards.items():
        assert metrics(engine, job, name) == pytest.approx([value], rel=1e-3, abs=1e-5), name


def test_trl_counts_the_line_break_behind_an_answer(engine: Engine) -> None:
    """The same tokens, and one more with loss; docs/finetuning.md says so."""
    init = random_adapter(engine.model, engine.folder / "trl-init")
    batch, examples = with_trl(engine, init, CHATML)
    newline = toy_tokenizer().encode("\n")
    assert all(ids[-1:] == newline and mask[-2:] == [1, 0] for ids, mask in examples)
    counted = [(ids, [*mask[:-1], 1]) for ids, mask in examples]
    assert sorted(counted) == sorted(batch.examples)


def test_preferences_are_learnt(engine: Engine) -> None:
    examples = random_examples([40] * 16, seed=6)
    job = submit(engine, examples, method="dpo", batch_size=4, n_epochs=12, learning_rate=5e-3)
    job = finish(engine, job)
    assert metrics(engine, job, "rewards/accuracies")[-1] == 1.0
    losses = metrics(engine, job, "train_loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.3


def wait_for_step(engine: Engine, job: Any, step: int) -> None:
    while engine.store.get_job(job.id).step < step:
        time.sleep(0.01)


def test_a_job_that_is_paused_ends_with_the_weights_of_an_unbroken_one(engine: Engine) -> None:
    examples = random_examples([random.Random(i).randrange(20, 90) for i in range(24)])
    options = {"batch_size": 4, "n_epochs": 10, "learning_rate": 1e-3, "shuffle": True,
               "validation": random_examples([40] * 3, seed=2), "eval_steps": 7}  # fmt: skip
    unbroken = finish(engine, submit(engine, examples, **options))
    job = submit(engine, examples, **options)
    for step in (3, 9, 10, 31):
        wait_for_step(engine, job, step)
        engine.store.request_pause(job.id)
        while engine.store.get_job(job.id).status is JobStatus.RUNNING:
            time.sleep(0.01)
        assert engine.store.get_job(job.id).status is JobStatus.PAUSED
        engine.store.resume(job.id)
    job = finish(engine, job)
    expected = weights(unbroken.adapter_path)
    for name, tensor in weights(job.adapter_path).items():
        assert reference.relative_error(tensor, expected[name]) < 1e-4, name
    assert metrics(engine, job, "train_loss") == pytest.approx(
        metrics(engine, unbroken, "train_loss"), rel=1e-4
    )
    steps = [e["step"] for e in engine.store.metrics_events(job.id) if "train_loss" in e]
    assert steps == list(range(1, 61))
    assert metrics(engine, job, "valid_loss") == pytest.approx(
        metrics(engine, unbroken, "valid_loss"), rel=1e-4
    )


def test_a_damaged_checkpoint_gives_way_to_the_one_before(engine: Engine) -> None:
    examples = random_examples([60] * 12)
    options = {"batch_size": 2, "n_epochs": 15, "learning_rate": 1e-3, "shuffle": True}
    unbroken = finish(engine, submit(engine, examples, **options))
    job = submit(engine, examples, **options)
    while len(kept := checkpoints.resumable_steps(job.checkpoints_path)) < 2:
        time.sleep(0.01)
    engine.store.request_pause(job.id)
    while engine.store.get_job(job.id).status is not JobStatus.PAUSED:
        time.sleep(0.01)
    before, newest = checkpoints.resumable_steps(job.checkpoints_path)[-2:]
    assert newest >= kept[-1]
    damaged = checkpoints.folder_of(job.checkpoints_path, newest) / checkpoints.OPTIMIZER_FILE
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    engine.store.resume(job.id)
    job = finish(engine, job)
    messages = [e.message for e in engine.store.list_events(job.id, limit=1000)[0]]
    assert any("damaged" in message and f"step-{newest}" in message for message in messages)
    assert f"Training continues at step {before}" in messages
    assert metrics(engine, job, "train_loss") == pytest.approx(
        metrics(engine, unbroken, "train_loss"), rel=1e-4
    )
    expected = weights(unbroken.adapter_path)
    for name, tensor in weights(job.adapter_path).items():
        assert reference.relative_error(tensor, expected[name]) < 1e-4, name


def test_a_job_has_the_losses_it_has_alone_beside_others(engine: Engine) -> None:
    def start(seed: int, r: int, targets: tuple[str, ...], steps: int) -> Any:
        lengths = [random.Random(seed * 100 + i).randrange(10, 120) for i in range(20)]
        lora = LoraSpec(r=r, lora_alpha=2 * r, target_modules=targets)
        return submit(engine, random_examples(lengths, seed), lora=lora, batch_size=3,
                      max_steps=steps, learning_rate=2e-3, shuffle=True, seed=seed,
                      max_grad_norm=1.0)  # fmt: skip

    job = start(1, 8, ALL_TARGETS, 20)
    alone = metrics(engine, finish(engine, job), "train_loss")
    others = [start(2, 16, ("q_proj", "v_proj"), 1000), start(3, 4, ("down_proj",), 1000)]
    for other in others:
        wait_for_step(engine, other, 1)
    job = start(1, 8, ALL_TARGETS, 20)
    steps = [engine.store.get_job(other.id).step for other in others]
    beside = metrics(engine, finish(engine, job), "train_loss")
    for other, step in zip(others, steps, strict=True):
        assert engine.store.get_job(other.id).step > step + 3, "it did not train meanwhile"
        engine.store.request_cancel(other.id)
        harness.wait(engine.store, other.id)
    assert len(alone) == 20
    assert beside == pytest.approx(alone, rel=1e-5)
    assert beside[-1] < beside[0] - 0.1


def test_gradients_and_tokens_are_the_same_where_the_backward_ends_at_a_deadline(
    engine: Engine,
) -> None:
    """Beside requests the worker runs the backward as far as there is time, in every iteration."""
    init = random_adapter(engine.model, engine.folder / "deadline")
    examples = random_examples([150, 9, 170, 70, 33, 200], seed=5)
    expected = reference_gradients(engine, init, examples)
    prompts = [{"prompt_token_ids": [5 + i, 7, 9, 11 + i]} for i in range(4)]
    sampling = SamplingParams(temperature=0.0, max_tokens=450, ignore_eos=True)

    def generate() -> list[list[int]]:
        found = engine.llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]

    alone = generate()
    engine.gradients()
    engine.llm.collective_rpc(harness.on_worker_count_optional)
    job = submit(engine, examples, init, batch_size=6, max_steps=1000, learning_rate=0.0)
    wait_for_step(engine, job, 1)
    steps = engine.store.get_job(job.id).step
    beside = [generate(), generate()]
    steps = engine.store.get_job(job.id).step - steps
    engine.store.request_cancel(job.id)
    harness.wait(engine.store, job.id)
    assert beside == [alone, alone]
    (cut,) = engine.llm.collective_rpc(harness.on_worker_optional_windows)
    assert steps >= 1, "it did not train meanwhile"
    assert len(cut) > 20
    assert any(cut)
    for got in engine.gradients():
        assert_equal(got, expected, 1e-4)


def test_checkpoints_of_each_epoch_and_of_save_steps(engine: Engine) -> None:
    examples = random_examples([30] * 8)
    job = finish(engine, submit(engine, examples, batch_size=4, n_epochs=5))
    assert engine.store.checkpoint_steps(job.id) == [6, 8, 10]
    job = submit(engine, examples, batch_size=4, n_epochs=5, save_steps=2, save_total_limit=2)
    job = finish(engine, job)
    assert engine.store.checkpoint_steps(job.id) == [8, 10]
    final = weights(job.adapter_path)
    for name, tensor in weights(job.checkpoints_path / "step-10").items():
        assert torch.equal(tensor, final[name])
    # Nothing of the optimizer stays behind a job that has ended.
    assert not list(job.checkpoints_path.rglob("optimizer.safetensors"))


def test_a_job_whose_checkpoints_cannot_be_written_fails_and_serving_goes_on(
    engine: Engine,
) -> None:
    examples = random_examples([30] * 8)
    job = submit(engine, examples, batch_size=2, n_epochs=50)
    wait_for_step(engine, job, 1)
    folder = job.checkpoints_path
    while True:  # a file where the folder should be
        try:
            for path in folder.parent.glob("checkpoints*"):
                harness.remove(path)
            folder.write_text("")
            break
        except (FileExistsError, IsADirectoryError):
            continue
    failed = harness.wait(engine.store, job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert failed.error.code == "checkpoint_failed"
    # Of token ids: transformers takes the tokenizer of this family for another one than it is.
    answer = engine.llm.generate({"prompt_token_ids": [5, 6, 7]}, use_tqdm=False)
    assert answer[0].outputs[0].token_ids
