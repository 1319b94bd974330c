import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from flexllm_vllm.data import TokenizedDataset
from flexllm_vllm.jobs import TARGET_MODULES

Upload = Callable[..., str]
HYPERPARAMETERS = "method.supervised.hyperparameters"
LORA = "method.supervised.lora"


def supervised(lora: dict[str, Any] | None = None, **hyperparameters: Any) -> dict[str, Any]:
    value = {"hyperparameters": hyperparameters, "lora": lora or {}}
    return {"type": "supervised", "supervised": value}


def create(client: openai.OpenAI, file_id: str, **options: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(**{"model": "demo", "training_file": file_id, **options})


def test_a_job_has_openais_form(client: openai.OpenAI, upload: Upload) -> None:
    file_id = upload()
    job = create(client, file_id, seed=42, suffix="json", metadata={"a": "b"})
    FineTuningJob.model_validate(job.model_dump(), strict=True)
    assert (job.status, job.model, job.training_file) == ("queued", "demo", file_id)
    assert (job.seed, job.metadata, job.trained_tokens) == (42, {"a": "b"}, None)
    assert job.hyperparameters.to_dict() == {
        "n_epochs": "auto",
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
    }
    assert client.fine_tuning.jobs.retrieve(job.id) == job


def test_targets_are_those_that_the_model_has(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    file_id = upload()
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, file_id, method=supervised({"target_modules": ["qkv_proj"]}))
    assert "qkv_proj cannot be trained on this server" in caught.value.message
    assert caught.value.param == f"{LORA}.target_modules"
    of_phi = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    server.app.state.finetuning = dataclasses.replace(server.service, target_modules=of_phi)
    job = server.store.get_job(create(client, file_id).id)
    assert set(job.lora.target_modules) == set(of_phi)
    with pytest.raises(openai.BadRequestError, match="q_proj cannot be trained on this server"):
        create(client, file_id, method=supervised({"target_modules": ["q_proj", "o_proj"]}))


def test_a_job_has_its_data_and_settings(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    method = supervised(
        {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "use_rslora": True},
        n_epochs=5,
        batch_size="auto",
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_seq_length=64,
        shuffle=False,
    )
    answer = create(client, upload(), method=method)
    job = server.store.get_job(answer.id)
    assert len(TokenizedDataset.load(job.dataset_path)) == 2
    assert (job.lora.r, job.lora.lora_alpha, job.lora.use_rslora) == (8, 16, True)
    assert job.lora.target_modules == ("q_proj", "v_proj")
    training = job.training
    assert (training.n_epochs, training.batch_size, job.total_steps) == (5, 1, 10)
    assert (training.learning_rate, training.lr_scheduler_type) == (1e-3, "cosine")
    assert (training.max_seq_length, training.shuffle) == (64, False)
    assert 0 <= training.seed < 2**31
    shown = answer.method.to_dict()["supervised"]
    assert shown["hyperparameters"]["n_epochs"] == 5
    assert shown["hyperparameters"]["learning_rate"] == 1e-3
    assert shown["lora"]["target_modules"] == ["q_proj", "v_proj"]


def test_the_deprecated_form_is_taken(server: Any, client: openai.OpenAI, upload: Upload) -> None:
    values = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 0.5}
    answer = create(client, upload(), hyperparameters=values)
    assert answer.hyperparameters.to_dict() == values
    job = server.store.get_job(answer.id)
    assert (job.total_steps, job.training.learning_rate) == (2, 1e-4)
    assert job.training.learning_rate_multiplier == 0.5
    assert job.lora.target_modules == TARGET_MODULES


def test_a_job_runs_to_its_adapter(server: Any, client: openai.OpenAI, upload: Upload) -> None:
    job_id = create(client, upload(), suffix="json").id
    claimed = server.store.claim_next_job()
    server.store.record_progress(job_id, 3, 6, 120)
    server.store.record_step(job_id, 3, {"train_loss": 0.5, "learning_rate": 1e-4})
    running = client.fine_tuning.jobs.retrieve(job_id)
    assert (running.status, running.fine_tuned_model) == ("running", None)
    assert running.estimated_finish is not None
    server.store.succeed(job_id, claimed.adapter_path)
    done = client.fine_tuning.jobs.retrieve(job_id)
    assert (done.status, done.trained_tokens) == ("succeeded", 120)
    assert done.fine_tuned_model == f"ft:demo:local:json:{job_id[6:14]}"
    assert done.finished_at is not None
    FineTuningJob.model_validate(done.model_dump(), strict=True)


def test_events_are_newest_first_in_pages(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    job_id = create(client, upload()).id
    server.store.claim_next_job()
    for step in range(5):
        server.store.record_step(job_id, step, {"train_loss": 1.0})
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=3))
    for event in events:
        FineTuningJobEvent.model_validate(event.model_dump(), strict=True)
    assert events[0].type == "metrics"
    assert events[0].data["step"] == 4
    assert [e.message.split(":")[0] for e in events[5:]] == [
        "Fine-tuning job started",
        "Files validated",
        "Validating training file",
        "Created fine-tuning job",
    ]


def test_truncated_and_skipped_examples_are_counted(client: openai.OpenAI, upload: Upload) -> None:
    pairs = [("p", "c"), ("p", "c" * 300), ("p" * 300, "c")]
    file_id = upload(*({"prompt": p, "completion": c} for p, c in pairs))
    job = create(client, file_id)
    warnings = {e.message for e in client.fine_tuning.jobs.list_events(job.id) if e.level == "warn"}
    assert warnings == {
        "1 examples are truncated to 256 tokens",
        "1 examples are skipped: no token to learn remains in them",
    }


def test_jobs_are_listed_and_cancelled(client: openai.OpenAI, upload: Upload) -> None:
    file_id = upload()
    ids = [create(client, file_id).id for _ in range(3)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    assert client.fine_tuning.jobs.cancel(ids[0]).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.fine_tuning.jobs.cancel(ids[0])


def test_a_failed_job_tells_why(server: Any, client: openai.OpenAI, upload: Upload) -> None:
    job_id = create(client, upload()).id
    server.store.claim_next_job()
    server.store.fail(job_id, "nan_loss", "The loss is not a number")
    failed = client.fine_tuning.jobs.retrieve(job_id)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("nan_loss", "The loss is not a number")


def test_an_unknown_job_is_not_found(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, lambda i: list(jobs.list_events(i))):
        with pytest.raises(openai.NotFoundError, match="ftjob-none"):
            call("ftjob-none")


@pytest.mark.parametrize(
    ("options", "status", "param", "message"),
    [
        ({"model": "gpt-5"}, 404, "model", "served: demo, alias"),
        ({"model": 1}, 400, "model", "string"),
        ({"training_file": "file-none"}, 404, "training_file", "file-none"),
        ({"suffix": "a/b"}, 400, "suffix", "letters"),
        ({"suffix": "a" * 65}, 400, "suffix", "64"),
        ({"seed": "7"}, 400, "seed", "integer"),
        ({"validation_file": "file-x"}, 404, "validation_file", "No such File"),
        (
            {"hyperparameters": {"eval_steps": 5}},
            400,
            "hyperparameters.eval_steps",
            "validation_file",
        ),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations.0", "are missing"),
        ({"metadata": {"a": 1}}, 400, "metadata.a", "string"),
        ({"extra_body": {"foo": 1}}, 400, "foo", "foo"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type", "'supervised' and 'dpo'"),
        ({"method": {"type": "dpo"}}, 400, "training_file", "dpo"),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "method", "the type is 'dpo'"),
        ({"method": supervised(beta=1)}, 400, f"{HYPERPARAMETERS}.beta", "beta"),
        ({"method": supervised(n_epochs=0)}, 400, f"{HYPERPARAMETERS}.n_epochs", "'auto'"),
        ({"method": supervised(n_epochs="3")}, 400, f"{HYPERPARAMETERS}.n_epochs", "'auto'"),
        ({"method": supervised(n_epochs=True)}, 400, f"{HYPERPARAMETERS}.n_epochs", "'auto'"),
        ({"method": supervised(batch_size=1.5)}, 400, f"{HYPERPARAMETERS}.batch_size", "'auto'"),
        ({"method": supervised(learning_rate=-1)}, 400, f"{HYPERPARAMETERS}.learning_rate", "0"),
        ({"method": supervised(max_steps=0)}, 400, f"{HYPERPARAMETERS}.max_steps", "-1"),
        (
            {"method": supervised(learning_rate=1e-4, learning_rate_multiplier=2)},
            400,
            f"{HYPERPARAMETERS}.learning_rate",
            "not both",
        ),
        (
            {"method": supervised(max_seq_length=257)},
            400,
            f"{HYPERPARAMETERS}.max_seq_length",
            "256",
        ),
        (
            {"method": supervised(lr_scheduler_type="step")},
            400,
            f"{HYPERPARAMETERS}.lr_scheduler_type",
            "cosine",
        ),
        ({"hyperparameters": {"epochs": 3}}, 400, "hyperparameters.epochs", "epochs"),
        (
            {"hyperparameters": {"n_epochs": 1}, "method": supervised(n_epochs=2)},
            400,
            "hyperparameters",
            "twice",
        ),
        ({"method": supervised({"r": 33})}, 400, f"{LORA}.r", "maximum of 32"),
        ({"method": supervised({"r": 0})}, 400, f"{LORA}.r", "1"),
        (
            {"method": supervised({"lora_dropout": 0.1})},
            400,
            f"{LORA}.lora_dropout",
            "lora_dropout",
        ),
        (
            {"method": supervised({"target_modules": ["lm_head"]})},
            400,
            f"{LORA}.target_modules",
            "lm_head",
        ),
        ({"method": supervised({"target_modules": []})}, 400, f"{LORA}.target_modules", "empty"),
        ({"method": supervised({"init_from": "ft:none"})}, 404, f"{LORA}.init_from", "ft:none"),
    ],
)
def test_a_bad_request_names_the_parameter(
    server: Any,
    client: openai.OpenAI,
    upload: Upload,
    options: dict[str, Any],
    status: int,
    param: str,
    message: str,
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, upload(), **options)
    assert caught.value.status_code == status
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert message in caught.value.message
    assert list(client.fine_tuning.jobs.list()) == []
    assert list((server.store.root / "jobs").iterdir()) == []


def test_data_without_anything_to_learn_is_refused(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    file_id = upload({"prompt": "p" * 300, "completion": "c"})
    with pytest.raises(openai.BadRequestError, match="none of the 1 examples") as caught:
        create(client, file_id)
    assert caught.value.param == "training_file"
    assert list((server.store.root / "jobs").iterdir()) == []


def test_a_body_that_is_no_json_is_refused(server: Any) -> None:
    url = f"{server.url}/v1/fine_tuning/jobs"
    for content in (b"{", b"", b"[1]", b"\xff"):
        answer = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_training_goes_on_from_an_adapter(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    file_id = upload()
    create(client, file_id, method=supervised({"r": 4, "target_modules": ["q_proj"]}))
    first = server.store.claim_next_job()
    first.adapter_path.mkdir()
    config = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}
    Path(first.adapter_path, "adapter_config.json").write_text(json.dumps(config))
    server.store.succeed(first.id, first.adapter_path)

    answer = create(client, file_id, method=supervised({"init_from": first.adapter_name}))
    second = server.store.get_job(answer.id)
    assert second.init_adapter_path == str(first.adapter_path)
    assert (second.lora.r, second.lora.target_modules) == (4, ("q_proj",))
    assert second.lora.init_from == first.adapter_name

    with pytest.raises(openai.BadRequestError, match="r is 8") as caught:
        create(client, file_id, method=supervised({"init_from": first.adapter_name, "r": 8}))
    assert caught.value.param == f"{LORA}.r"
    third = server.store.get_job(create(client, file_id, model=first.adapter_name).id)
    assert (third.model, third.lora) == ("demo", second.lora)
    assert third.init_adapter_path == second.init_adapter_path
    with pytest.raises(openai.BadRequestError, match="give one"):
        create(client, file_id, model=first.adapter_name, method=supervised({"init_from": "x"}))


PAIR = {
    "input": {"messages": [{"role": "user", "content": "2+3?"}]},
    "preferred_output": [{"role": "assistant", "content": "5"}],
    "non_preferred_output": [{"role": "assistant", "content": "23"}],
}


def test_a_job_on_preferences(server: Any, client: openai.OpenAI, upload: Upload) -> None:
    hyperparameters = {"beta": 0.25, "n_epochs": 2, "batch_size": 2}
    job = create(
        client,
        upload(PAIR, PAIR, PAIR),
        validation_file=upload(PAIR),
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    )
    assert job.method.type == "dpo"
    assert job.method.dpo.hyperparameters.beta == 0.25
    assert job.hyperparameters.n_epochs == 2
    stored = server.store.get_job(job.id)
    assert (stored.method, stored.training.beta, stored.total_steps) == ("dpo", 0.25, 4)
    assert stored.dataset_path.exists()
    assert stored.validation_path.exists()


def test_settings_of_evaluation(server: Any, client: openai.OpenAI, upload: Upload) -> None:
    wanted = {"eval_steps": 2, "early_stopping_patience": 3, "load_best_model_at_end": True,
              "save_steps": 4, "save_total_limit": 5}  # fmt: skip
    job = create(client, upload(), validation_file=upload(), hyperparameters=wanted)
    training = server.store.get_job(job.id).training
    assert {name: getattr(training, name) for name in wanted} == wanted
    shown = job.method.supervised.hyperparameters.model_dump()
    assert wanted.items() <= shown.items()


def test_an_error_in_the_validation_file_names_it(client: openai.OpenAI, upload: Upload) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, upload(), validation_file=upload(PAIR))
    assert caught.value.param == "validation_file"
    assert caught.value.code == "invalid_validation_file"


def test_a_bug_of_ours_is_a_500_and_the_server_lives_on(
    server: Any, client: openai.OpenAI, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(server.service, "load_tokenizer", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        create(client, upload())
    assert caught.value.type == "server_error"
    assert "secret" not in caught.value.message
    assert list(client.fine_tuning.jobs.list()) == []
