"""Weights & Biases and MLflow, by their own clients: offline files, and a database."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from flexllm_vllm.api.tracker_access import TrackerAccess
from flexllm_vllm.api.tracker_process import ProcessSink
from flexllm_vllm.api.tracker_sinks import sink_opener
from flexllm_vllm.jobs import FinetuningJob, JobStore

EXAMPLE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
WANDB = {"type": "wandb", "wandb": {"project": "orders", "name": "first", "tags": ["a", "b"]}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment_name": "orders", "tags": {"team": "search"}}}


@pytest.fixture
def use(server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrackerAccess]:
    """Run the server in an environment."""

    def use(report_to: Any = (), key_file: Path | None = None, **variables: str) -> TrackerAccess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW"))}
        access = TrackerAccess(report_to, key_file, {**environment, **variables})
        server.service.trackers = access
        server.app.state.finetuning_tracking._open_sink = sink_opener(access)
        return access

    return use


@pytest.fixture
def create(client: openai.OpenAI, server: Any) -> Callable[..., FinetuningJob]:
    """Create a job, and begin it as an engine does."""

    def create(*integrations: Any) -> FinetuningJob:
        file = client.files.create(file=("a.jsonl", EXAMPLE), purpose="fine-tune")
        more: Any = {"integrations": list(integrations)} if integrations else {}
        client.fine_tuning.jobs.create(model="demo", training_file=file.id, **more)
        return server.store.claim_next_job()

    return create


def train(store: JobStore, job_id: str, first: int, last: int) -> None:
    for step in range(first, last + 1):
        store.record_step(job_id, step, {"train_loss": 1 / step, "grad_norm": 2.0})
    store.record_evaluation(job_id, last, {"valid_loss": 3.0})


def wait_until(condition: Callable[[], Any], timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def column(store: JobStore, name: str, job: Any, kind: str) -> Any:
    with store._database.read() as connection:
        query = f"SELECT {name} FROM trackers WHERE job_id = ? AND kind = ?"
        return connection.exec_driver_sql(query, (job.id, kind)).scalar_one()


def end(store: JobStore, job: FinetuningJob, kind: str) -> None:
    """The job succeeds, and its tracker has been told."""
    store.succeed(job.id, job.adapter_path)
    wait_until(lambda: column(store, "next_attempt_at", job, kind) is None)


def messages(client: openai.OpenAI, job: FinetuningJob, level: str) -> list[str]:
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    return [event.message for event in events if event.level == level]


def wandb_records(job: FinetuningJob) -> list[Any]:
    """What lies in the offline files of a job, in the order in which it was written."""
    from wandb.proto.wandb_internal_pb2 import Record

    paths = sorted((job.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    return [Record.FromString(data) for path in paths for data in leveldb_log(path.read_bytes())]


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format, of which the first seven bytes are W&B's own."""
    block, at, record = 32768, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # no header fits into the rest of a block
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield record
            record = b""


def wandb_history(job: FinetuningJob) -> list[dict[str, str]]:
    rows = [r.history for r in wandb_records(job) if r.WhichOneof("record_type") == "history"]
    return [
        {(item.nested_key[0] if item.nested_key else item.key): item.value_json for item in r.item}
        for r in rows
    ]


def tracker_processes() -> list[int]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "flexllm_vllm.trackers.program" in child.cmdline():
                found.append(child.pid)
    return found


def test_wandb_gets_each_step_once(
    use: Any, create: Any, client: openai.OpenAI, server: Any
) -> None:
    use(WANDB_MODE="offline")
    job = create(WANDB)
    shown = client.fine_tuning.jobs.retrieve(job.id).integrations
    assert shown is not None
    assert shown[0].wandb.project == "orders"
    train(server.store, job.id, 1, 3)
    wait_until(lambda: column(server.store, "position", job, "wandb"))
    train(server.store, job.id, 4, 6)
    end(server.store, job, "wandb")
    rows = wandb_history(job)
    assert [row["train/loss"] for row in rows] == [
        "1", "0.5", "0.3333333333333333", "0.25", "0.2", "0.16666666666666666",
    ]  # fmt: skip
    assert [row["_step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert rows[2]["valid/loss"] == rows[5]["valid/loss"] == "3"
    run = next(r.run for r in wandb_records(job) if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == (job.id, "orders", "first")
    assert list(run.tags) == ["a", "b"]
    assert messages(client, job, "warn") == []
    wait_until(lambda: not tracker_processes())


@pytest.fixture
def mlflow(tmp_path: Path) -> tuple[str, Any]:
    """A tracking store, and MLflow's client of it."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return uri, MlflowClient(uri)


def mlflow_run(client: Any, name: str = "orders") -> Any:
    experiment = client.get_experiment_by_name(name)
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def mlflow_steps(client: Any, tag: str = "train/loss") -> list[int]:
    run = mlflow_run(client)
    return [metric.step for metric in client.get_metric_history(run.info.run_id, tag)]


def test_mlflow_gets_each_step_once_though_its_process_is_killed(
    use: Any, create: Any, server: Any, client: openai.OpenAI, mlflow: Any
) -> None:
    uri, theirs = mlflow
    use(MLFLOW_TRACKING_URI=uri)
    server.app.state.finetuning_tracking._retry_delays_s = (0, 0, 0)
    job = create(MLFLOW)
    train(server.store, job.id, 1, 3)
    wait_until(lambda: column(server.store, "position", job, "mlflow"))
    (pid,) = tracker_processes()
    os.kill(pid, signal.SIGKILL)
    train(server.store, job.id, 4, 6)
    end(server.store, job, "mlflow")
    run = mlflow_run(theirs)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == job.adapter_name
    tags = {"team": "search", "fine_tuning_job_id": job.id, "fine_tuned_model": job.adapter_name}
    assert tags.items() <= run.data.tags.items()
    assert run.data.params["learning_rate"] == str(job.training.learning_rate)
    assert run.data.params["lora.r"] == "16"
    assert mlflow_steps(theirs) == [1, 2, 3, 4, 5, 6]
    assert mlflow_steps(theirs, "valid/loss") == [3, 6]
    (warning,) = messages(client, job, "warn")
    assert "MLflow has a problem: its process ended with -9" in warning
    assert f"MLflow run: {run.info.run_id} in the experiment orders" in messages(
        client, job, "info"
    )


def test_a_tracker_that_cannot_be_reached_is_one_warning_and_the_job_goes_on(
    use: Any, create: Any, server: Any, client: openai.OpenAI
) -> None:
    use(
        MLFLOW_TRACKING_URI="http://me:pass-word-1@127.0.0.1:9",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MLFLOW_TRACKING_TOKEN="token-1",
    )
    server.app.state.finetuning_tracking._retry_delays_s = (0, 0)
    job = create(MLFLOW)
    train(server.store, job.id, 1, 3)
    wait_until(lambda: messages(client, job, "warn"))
    train(server.store, job.id, 4, 6)
    end(server.store, job, "mlflow")  # given up
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
    assert column(server.store, "attempts", job, "mlflow") == 3
    (warning,) = messages(client, job, "warn")
    assert "MLflow has a problem" in warning
    assert "pass-word-1" not in warning
    assert column(server.store, "position", job, "tensorboard") > 0
    wait_until(lambda: not tracker_processes())


def test_the_wandb_key_is_nowhere_to_be_read(
    use: Any, create: Any, server: Any, client: openai.OpenAI, tmp_path: Path, caplog: Any
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("no-real-key-0\n")
    access = use(key_file=key_file)
    assert access.process_environment("wandb")["WANDB_API_KEY"] == "no-real-key-0"
    assert "WANDB_API_KEY" not in access.process_environment("mlflow")
    server.app.state.finetuning_tracking._retry_delays_s = ()
    job = create(WANDB)
    train(server.store, job.id, 1, 3)
    end(server.store, job, "wandb")  # W&B's client refuses such a key by itself
    (warning,) = messages(client, job, "warn")
    assert "Weights & Biases has a problem" in warning
    assert "no-real-key" not in caplog.text + repr(access) + warning
    for path in (tmp_path / "store").rglob("*"):
        assert path.is_dir() or b"no-real-key" not in path.read_bytes(), path


def test_a_tracker_that_hangs_is_ended(
    use: Any, create: Any, server: Any, client: openai.OpenAI, mlflow: Any
) -> None:
    uri, theirs = mlflow
    access = use(MLFLOW_TRACKING_URI=uri)
    tracking = server.app.state.finetuning_tracking
    tracking._retry_delays_s = (0, 0)
    sinks: list[ProcessSink] = []

    def opening(*arguments: Any) -> Any:
        sink = sink_opener(access)(*arguments)
        if isinstance(sink, ProcessSink):
            sinks.append(sink)
        return sink

    tracking._open_sink = opening
    job = create(MLFLOW)
    train(server.store, job.id, 1, 3)
    wait_until(lambda: column(server.store, "position", job, "mlflow"))
    (hanging,) = tracker_processes()
    sinks[0]._answer_s = 0.5
    os.kill(hanging, signal.SIGSTOP)
    train(server.store, job.id, 4, 6)
    end(server.store, job, "mlflow")
    assert hanging not in tracker_processes()
    assert mlflow_steps(theirs) == [1, 2, 3, 4, 5, 6]
    assert "no answer within" in messages(client, job, "warn")[0]


def test_a_server_that_ends_puts_the_run_aside_and_the_next_one_goes_on(
    use: Any, create: Any, server: Any, start_server: Any, mlflow: Any
) -> None:
    uri, theirs = mlflow
    access = use(MLFLOW_TRACKING_URI=uri)
    job = create(MLFLOW)
    train(server.store, job.id, 1, 3)
    wait_until(lambda: column(server.store, "position", job, "mlflow"))
    server.app.state.finetuning_tracking._stop.set()
    wait_until(lambda: column(server.store, "claimed_by", job, "mlflow") is None)
    wait_until(lambda: not tracker_processes())
    assert mlflow_run(theirs).info.status == "RUNNING"
    other = start_server()
    other.app.state.finetuning_tracking._open_sink = sink_opener(access)
    train(other.store, job.id, 4, 6)
    end(other.store, job, "mlflow")
    assert mlflow_steps(theirs) == [1, 2, 3, 4, 5, 6]


def test_a_job_that_never_ran_has_no_run(
    use: Any, client: openai.OpenAI, server: Any, mlflow: Any
) -> None:
    uri, theirs = mlflow
    use(MLFLOW_TRACKING_URI=uri)
    file = client.files.create(file=("a.jsonl", EXAMPLE), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="demo", training_file=file.id, integrations=[MLFLOW])
    client.fine_tuning.jobs.cancel(job.id)
    wait_until(lambda: column(server.store, "next_attempt_at", job, "mlflow") is None)
    assert theirs.get_experiment_by_name("orders") is None


def test_a_flag_has_every_job_tracked(use: Any, create: Any, server: Any, mlflow: Any) -> None:
    uri, theirs = mlflow
    use(("mlflow",), MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="all jobs")
    job = create()
    assert job.integrations is None
    train(server.store, job.id, 1, 3)
    end(server.store, job, "mlflow")
    assert mlflow_run(theirs, "all jobs").data.tags["fine_tuning_job_id"] == job.id
    kinds = Counter(each.kind for each in server.service.trackers.trackers(None))
    assert kinds == {"tensorboard": 1, "mlflow": 1}


@pytest.mark.parametrize(
    ("integrations", "param", "message"),
    [
        ([{"type": "comet"}], "integrations.0.type", "'wandb' and 'mlflow'"),
        ([{"type": "wandb"}], "integrations.0", "missing"),
        ([{"type": "wandb", "mlflow": {"experiment_name": "a"}}], "integrations.0", "'mlflow'"),
        ([{"type": "wandb", "wandb": {}}], "integrations.0.wandb.project", "required"),
        ([{"type": "wandb", "wandb": {"project": "a/b"}}], "integrations.0.wandb.project", "match"),
        ([{"type": "wandb", "wandb": {"project": "a", "x": 1}}], "integrations.0.wandb.x", "x"),
        ([WANDB, WANDB], "integrations[1]", "twice"),
    ],
)  # fmt: skip
def test_bad_integrations_are_refused(
    use: Any, client: openai.OpenAI, integrations: Any, param: str, message: str
) -> None:
    use(WANDB_MODE="offline")
    file = client.files.create(file=("a.jsonl", EXAMPLE), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(
            model="demo", training_file=file.id, integrations=integrations
        )
    assert error.value.param == param
    assert message in error.value.message


def test_what_the_server_lacks_for_a_tracker_is_said_when_the_job_is_created(
    use: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = client.files.create(file=("a.jsonl", EXAMPLE), purpose="fine-tune")

    def refusal(integration: Any) -> str:
        with pytest.raises(openai.BadRequestError) as error:
            client.fine_tuning.jobs.create(
                model="demo", training_file=file.id, integrations=[integration]
            )
        assert error.value.param == "integrations[0]"
        return error.value.message

    use()
    assert "WANDB_API_KEY" in refusal(WANDB)
    assert "MLFLOW_TRACKING_URI" in refusal(MLFLOW)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    use(WANDB_MODE="offline")
    assert "pip install 'flexllm-vllm[wandb]'" in refusal(WANDB)


def test_flags_that_cannot_be_served_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--finetuning-report-to mlflow: MLFLOW_TRACKING_URI"):
        TrackerAccess(("mlflow",), environment={}).check()
    with pytest.raises(ValueError, match="cannot be read"):
        TrackerAccess((), tmp_path / "none", {}).check()
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is empty"):
        TrackerAccess((), tmp_path / "empty", {}).check()
    (tmp_path / "key").write_text("k" * 40)
    TrackerAccess(("wandb",), tmp_path / "key", {}).check()
