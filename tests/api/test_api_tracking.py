"""The metrics of jobs reach their trackers, once each, whatever happens to the process."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flexllm_vllm.api.tracker_sinks import TensorBoardSink
from flexllm_vllm.api.tracking import Tracking
from flexllm_vllm.jobs import FinetuningJob, JobStore
from flexllm_vllm.trackers.points import MetricPoint

LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def wait_until(condition: Callable[[], Any], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def train(store: JobStore, job_id: str, first: int, last: int) -> None:
    """What the engine records of these steps; an evaluation after each even one."""
    for step in range(first, last + 1):
        metrics = {
            "train_loss": 1 / step,
            "train_mean_token_accuracy": step / 100,
            "learning_rate": 1e-3,
            "grad_norm": 2.0,
            "tokens": 64,
            "tokens_per_second": 128.0,
        }
        store.record_step(job_id, step, metrics)
        if step % 2 == 0:
            evaluation = {"valid_loss": 2 / step, "valid_mean_token_accuracy": 0.5}
            store.record_evaluation(job_id, step, evaluation)


def scalars(job: FinetuningJob) -> dict[str, list[int]]:
    """The steps of each tag as TensorBoard itself reads them."""
    events = EventAccumulator(str(job.tensorboard_path))
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def has_all(store: JobStore, job_id: str, kind: str = "tensorboard") -> bool:
    """Whether the tracker has been told everything of a job that has ended."""
    with store._database.read() as connection:
        query = "SELECT next_attempt_at FROM trackers WHERE job_id = ? AND kind = ?"
        row = connection.exec_driver_sql(query, (job_id, kind)).one()
    return row[0] is None


def seen(store: JobStore, job_id: str, kind: str = "tensorboard") -> int:
    with store._database.read() as connection:
        query = "SELECT position FROM trackers WHERE job_id = ? AND kind = ?"
        return connection.exec_driver_sql(query, (job_id, kind)).scalar_one()


def last_event(store: JobStore, job_id: str) -> int:
    return store.events_since(job_id, 0)[1]


@pytest.fixture
def running(client: openai.OpenAI, upload: Callable[..., str], server: Any) -> FinetuningJob:
    """A job that an engine has begun."""
    client.fine_tuning.jobs.create(model="demo", training_file=upload())
    job = server.store.claim_next_job()
    assert job is not None
    return job


def test_every_job_has_tensorboard_files(running: FinetuningJob, server: Any) -> None:
    store = server.store
    train(store, running.id, 1, 3)
    wait_until(lambda: seen(store, running.id) == last_event(store, running.id))
    assert scalars(running)["train/loss"] == [1, 2, 3]  # while it runs
    train(store, running.id, 4, 6)
    store.succeed(running.id, running.adapter_path)
    wait_until(lambda: has_all(store, running.id))
    every = list(range(1, 7))
    assert scalars(running) == {
        "train/loss": every,
        "train/token_accuracy": every,
        "train/learning_rate": every,
        "train/grad_norm": every,
        "train/tokens": every,
        "train/tokens_per_second": every,
        "valid/loss": [2, 4, 6],
        "valid/token_accuracy": [2, 4, 6],
    }
    events = EventAccumulator(str(running.tensorboard_path))
    events.Reload()
    last = events.Scalars("train/loss")[-1]
    assert last.value == pytest.approx(1 / 6)
    assert abs(last.wall_time - time.time()) < 60


def test_after_a_crash_no_step_is_there_twice(
    start_server: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has written more than it has recorded dies; another one goes on."""
    server = start_server()
    client = server.client()
    file = client.files.create(file=("a.jsonl", LINE), purpose="fine-tune")
    client.fine_tuning.jobs.create(model="demo", training_file=file.id)
    store = server.store
    job = store.claim_next_job()
    train(store, job.id, 1, 4)
    wait_until(lambda: seen(store, job.id) == last_event(store, job.id))
    monkeypatch.setattr(type(store.trackers), "advance", lambda *_: True)  # it is never recorded
    train(store, job.id, 5, 8)
    wait_until(lambda: scalars(job)["valid/loss"] == [2, 4, 6, 8])
    monkeypatch.undo()
    server.app.state.finetuning_tracking._stop.set()
    with store._database.write() as connection:  # as if the lease of the dead were over
        # Its last record is of step 4 without its evaluation: both are written again.
        connection.exec_driver_sql(
            "UPDATE trackers SET claimed_by = NULL, claimed_until = NULL, position = position - 1"
        )
    other = start_server()
    train(other.store, job.id, 9, 10)
    other.store.succeed(job.id, job.adapter_path)
    wait_until(lambda: has_all(other.store, job.id))
    assert len(list(job.tensorboard_path.iterdir())) == 2
    assert scalars(job)["train/loss"] == list(range(1, 11))
    assert scalars(job)["valid/loss"] == [2, 4, 6, 8, 10]


def test_a_paused_job_is_let_go_and_taken_up_again(running: FinetuningJob, server: Any) -> None:
    store = server.store
    train(store, running.id, 1, 2)
    store.request_pause(running.id)
    store.paused(running.id, 2)

    def claimed() -> Any:
        with store._database.read() as connection:
            return connection.exec_driver_sql("SELECT claimed_by FROM trackers").scalar_one()

    wait_until(lambda: seen(store, running.id) and claimed() is None)
    store.resume(running.id)
    assert store.claim_next_job().id == running.id
    train(store, running.id, 3, 4)
    store.succeed(running.id, running.adapter_path)
    wait_until(lambda: has_all(store, running.id))
    assert scalars(running)["train/loss"] == [1, 2, 3, 4]


def test_a_job_that_never_ran_has_no_files(client: openai.OpenAI, upload: Any, server: Any) -> None:
    job = client.fine_tuning.jobs.create(model="demo", training_file=upload())
    client.fine_tuning.jobs.cancel(job.id)
    wait_until(lambda: has_all(server.store, job.id))
    assert not server.store.get_job(job.id).tensorboard_path.exists()


class Failing(TensorBoardSink):
    """Its first writes fail."""

    failures = 0

    def write(self, points: Sequence[MetricPoint]) -> None:
        if Failing.failures:
            Failing.failures -= 1
            raise OSError(28, "No space left on device, key sekret-value at http://u:pw@host/")
        super().write(points)


def fail(server: Any, monkeypatch: pytest.MonkeyPatch, times: int, retry_delays_s: Any) -> None:
    monkeypatch.setattr(Failing, "failures", times)
    tracking = server.app.state.finetuning_tracking
    tracking._open_sink = lambda job, tracker, live: Failing(job)
    tracking._retry_delays_s = retry_delays_s


def test_a_failing_tracker_is_told_once_and_catches_up(
    running: FinetuningJob, server: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sekret-value")
    fail(server, monkeypatch, times=3, retry_delays_s=(0, 0, 0, 0))
    train(server.store, running.id, 1, 4)
    server.store.succeed(running.id, running.adapter_path)
    wait_until(lambda: has_all(server.store, running.id))
    assert Failing.failures == 0
    assert scalars(running)["train/loss"] == [1, 2, 3, 4]
    events = client.fine_tuning.jobs.list_events(running.id, limit=100).data
    warnings = [event.message for event in events if event.level == "warn"]
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert "sekret" not in warnings[0]
    assert "pw@" not in warnings[0]
    assert client.fine_tuning.jobs.retrieve(running.id).status == "succeeded"


def test_a_tracker_that_never_works_is_given_up(
    running: FinetuningJob, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(server, monkeypatch, times=99, retry_delays_s=(0, 0))
    train(server.store, running.id, 1, 2)
    wait_until(lambda: has_all(server.store, running.id))
    assert Failing.failures == 96
    assert "No space" in server.store.trackers.last_error(running.id, "tensorboard")
    train(server.store, running.id, 3, 4)  # and the job goes on
    server.store.succeed(running.id, running.adapter_path)


def test_two_processes_do_not_track_a_job_twice(start_server: Callable[[], Any]) -> None:
    first, second = start_server(), start_server()
    client = first.client()
    file = client.files.create(file=("a.jsonl", LINE), purpose="fine-tune")
    jobs = []
    for _ in range(6):
        client.fine_tuning.jobs.create(model="demo", training_file=file.id)
        jobs.append(first.store.claim_next_job())
    for job in jobs:
        train(second.store, job.id, 1, 6)
    for job in jobs:
        first.store.succeed(job.id, job.adapter_path)
    for job in jobs:
        wait_until(lambda job=job: has_all(first.store, job.id))
        assert len(list(job.tensorboard_path.iterdir())) == 1
        assert scalars(job)["train/loss"] == list(range(1, 7))


def test_a_claim_that_is_lost_is_not_written_for(server: Any, running: FinetuningJob) -> None:
    store: JobStore = server.store
    train(store, running.id, 1, 2)
    wait_until(lambda: seen(store, running.id) == last_event(store, running.id))
    with store._database.write() as connection:
        connection.exec_driver_sql("UPDATE trackers SET claimed_by = 'another'")
    train(store, running.id, 3, 4)
    tracking: Tracking = server.app.state.finetuning_tracking
    wait_until(lambda: not tracking._sessions)
    assert seen(store, running.id) < last_event(store, running.id)
