import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import openai
import pytest
from fastapi import Body, FastAPI


def test_create_uploads_the_file_and_says_everything_of_the_job(
    run: Any, server: Any, client: openai.OpenAI, train: Path
) -> None:
    options = "--model alias --suffix orders --seed 7 --n-epochs 4 --batch-size 2"
    options += " --learning-rate 1e-3 --lora-r 8 --lora-alpha 16 --metadata team=a"
    options += " --set max_seq_length=64 --set lr_scheduler_type=cosine --set lora.use_rslora=true"
    targets = 'lora.target_modules=["q_proj"]'
    result = run("jobs", "create", train, *options.split(), "--set", targets)
    assert result.exit_code == 0
    (job,) = client.fine_tuning.jobs.list()
    (file,) = client.files.list()
    assert f"Uploaded {train} as {file.id}" in result.err
    assert (file.filename, job.training_file) == ("train.jsonl", file.id)
    assert (job.model, job.seed, job.metadata) == ("alias", 7, {"team": "a"})
    stored = server.store.get_job(job.id)
    assert (stored.suffix, stored.lora.r, stored.lora.lora_alpha) == ("orders", 8, 16)
    assert (stored.lora.use_rslora, stored.lora.target_modules) == (True, ("q_proj",))
    training = stored.training
    assert (training.n_epochs, training.batch_size, training.learning_rate) == (4, 2, 1e-3)
    assert (training.max_seq_length, training.lr_scheduler_type) == (64, "cosine")
    shown = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert (shown["id"], shown["status"]) == (job.id, "queued")
    assert "n_epochs=4" in shown["hyperparameters"]
    assert "r=8, lora_alpha=16, use_rslora=True, target_modules=q_proj" in shown["lora"]


def test_create_takes_an_id_and_the_servers_base_model(
    run: Any, client: openai.OpenAI, upload: Callable[..., str]
) -> None:
    file_id = upload()
    result = run("jobs", "create", file_id, "--n-epochs", "auto", "--json")
    job = json.loads(result.out)
    assert (job["training_file"], job["model"]) == (file_id, "demo")
    assert result.err == ""
    assert client.fine_tuning.jobs.retrieve(job["id"]).to_dict() == job


def test_dpo_and_a_validation_file_are_asked_for(
    run: Any, client: openai.OpenAI, create: Any, serve: Callable[[FastAPI], str]
) -> None:
    job = client.fine_tuning.jobs.retrieve(create()).to_dict()
    bodies: list[Any] = []
    app = FastAPI()

    @app.post("/v1/fine_tuning/jobs")
    def take(body: Annotated[Any, Body()]) -> Any:
        bodies.append(body)
        return job

    options = "--model demo --validation-file file-b --method dpo --beta 0.2 --set save_steps=5"
    options += " --wandb-project orders --mlflow-experiment nightly"
    url = f"{serve(app)}/v1"
    assert run("jobs", "create", "file-a", *options.split(), "--base-url", url).exit_code == 0
    hyperparameters = {"beta": 0.2, "save_steps": 5}
    expected = {"model": "demo", "training_file": "file-a", "validation_file": "file-b"}
    method = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    integrations = [
        {"type": "wandb", "wandb": {"project": "orders"}},
        {"type": "mlflow", "mlflow": {"experiment_name": "nightly"}},
    ]
    assert bodies == [{**expected, "method": method, "integrations": integrations}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-epochs", "many"], "neither a whole number nor 'auto'"),
        (["--beta", "0.1"], "of --method dpo only"),
        (["--method", "rlhf"], "rlhf"),
        (["--set", "max_steps"], "is not name=value"),
        (["--set", "n_epochs=2", "--n-epochs", "3"], "n_epochs is given by --n-epochs too"),
        (["--set", "lora.r=2", "--lora-r", "3"], "lora.r is given by --lora-r too"),
        (["--metadata", "a=1", "--metadata", "a=2"], "a is given twice"),
        (["--validation-file", "none.jsonl"], "neither a file here nor an id"),
        (["--epochs", "3"], "No such option"),
    ],
)
def test_wrong_usage_has_an_exit_code_of_its_own(
    run: Any, client: openai.OpenAI, train: Path, options: list[str], message: str
) -> None:
    result = run("jobs", "create", train, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.err.split()).replace("│ │ ", "")
    assert list(client.fine_tuning.jobs.list()) == []


def test_a_path_that_does_not_exist_is_wrong_usage(run: Any) -> None:
    for arguments in (("jobs", "create", "none.jsonl"), ("files", "upload", "none.jsonl")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "none.jsonl" in result.err


def test_a_refused_job_shows_message_and_parameter(run: Any, train: Path) -> None:
    result = run("jobs", "create", train, "--lora-r", 64)
    assert (result.exit_code, result.out) == (1, "")
    assert "rank 64 is above this server's maximum of 32" in result.err
    assert "(parameter: method.supervised.lora.r)" in result.err
    assert "Traceback" not in result.err

    result = run("jobs", "create", train, "--set", "lr_scheduler_type=step", "--json")
    assert (result.exit_code, result.out) == (1, "")
    error = json.loads(result.err.splitlines()[-1])["error"]
    assert error["param"] == "method.supervised.hyperparameters.lr_scheduler_type"
    assert error["type"] == "invalid_request_error"


def test_lists_follow_their_pages(run: Any, create: Callable[..., str], server: Any) -> None:
    server.service.limits = replace(server.service.limits, max_queued_jobs=1000)
    ids = [create(metadata={"n": str(n % 2)}) for n in range(103)][::-1]

    def listed(*options: Any) -> tuple[list[str], bool]:
        page = json.loads(run("jobs", "list", "--json", *options).out)
        return [job["id"] for job in page["data"]], page["has_more"]

    assert listed() == (ids[:20], True)
    assert listed("--limit", 102) == (ids[:102], True)
    assert listed("--limit", 103) == (ids, False)
    assert listed("--all") == (ids, False)
    assert listed("--metadata", "n=0", "--limit", 2) == ([ids[0], ids[2]], True)
    assert run("jobs", "list", "--limit", 0).exit_code == 2
    result = run("jobs", "list", "--limit", 1)
    assert result.out.splitlines()[0].split()[:3] == ["ID", "STATUS", "MODEL"]
    assert result.out.splitlines()[1].split()[:3] == [ids[0], "queued", "demo"]
    assert "--all" in result.err
    assert "--all" not in run("jobs", "list", "--all").err


def test_a_job_that_failed_is_shown_with_its_error(
    run: Any, server: Any, create: Callable[..., str]
) -> None:
    job_id = create()
    server.store.claim_next_job()
    server.store.fail(job_id, "nan_loss", "The loss is not a number")
    result = run("jobs", "show", job_id)
    assert result.exit_code == 0
    assert "The loss is not a number (nan_loss)" in result.out
    assert json.loads(run("jobs", "show", job_id, "--json").out)["status"] == "failed"


def test_events_are_shown_in_the_order_of_time(
    run: Any, server: Any, create: Callable[..., str]
) -> None:
    job_id = create()
    server.store.claim_next_job()
    for step in range(1, 4):
        metrics = {"train_loss": 0.5, "tokens_per_second": 1234.0}
        server.store.record_step(job_id, step, metrics)
    server.store.add_event(job_id, "warn", "Something \x1b[2Jodd")
    lines = run("jobs", "events", job_id).out.splitlines()
    assert f"Created fine-tuning job: {job_id}" in lines[0]
    assert "Step 3/6: training loss=0.5000 (1,234 tokens/s)" in lines[-2]
    assert lines[-1].endswith("warn: Something \N{REPLACEMENT CHARACTER}[2Jodd")
    result = run("jobs", "events", job_id, "--limit", 2, "--json")
    page = json.loads(result.out)
    assert [event["data"] and event["data"]["step"] for event in page["data"]] == [3, {}]
    assert page["has_more"]


def test_a_job_is_cancelled_paused_and_resumed(
    run: Any, server: Any, client: openai.OpenAI, create: Callable[..., str]
) -> None:
    job_id = create()
    status = lambda: client.fine_tuning.jobs.retrieve(job_id).status  # noqa: E731
    assert run("jobs", "pause", job_id).out == f"{job_id} is paused\n"
    assert status() == "paused"
    assert run("jobs", "resume", job_id).out == f"{job_id} is queued\n"
    assert status() == "queued"
    server.store.claim_next_job()
    expected = f"{job_id} is running, and will be cancelled at its next step\n"
    assert run("jobs", "cancel", job_id).out == expected
    server.store.cancelled(job_id)
    result = run("jobs", "cancel", job_id)
    assert result.exit_code == 1
    assert "cancelled" in result.err
    other = create()
    assert json.loads(run("jobs", "cancel", other, "--json").out)["status"] == "cancelled"


def test_checkpoints_are_listed(
    run: Any, server: Any, create: Callable[..., str], tmp_path: Path
) -> None:
    job_id = create(suffix="orders")
    server.store.claim_next_job()
    for step in (2, 4):
        metrics = {"step": step, "train_loss": 0.25, "valid_loss": 0.5}
        server.store.record_checkpoint(job_id, step, tmp_path, metrics)
    rows = [line.split() for line in run("jobs", "checkpoints", job_id).out.splitlines()]
    name = f"ft:demo:local:orders:{job_id[6:14]}:ckpt-step-4"
    assert rows[1][:4] == ["4", name, "0.2500", "0.5000"]
    page = json.loads(run("jobs", "checkpoints", job_id, "--limit", 1, "--json").out)
    assert [found["step_number"] for found in page["data"]] == [4]
    assert page["has_more"]
