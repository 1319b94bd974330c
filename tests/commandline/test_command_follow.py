"""Jobs that are followed to their end, while this file takes the engine's place."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI, Response

from flexllm_vllm.commandline import follow

COMMAND = [sys.executable, "-c", "from flexllm_vllm.commandline.main import main; main()"]


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Run something beside the body."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join(timeout=90)
    assert failures == []


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something to be true."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def train_steps(store: Any, job_id: str, first: int, last: int) -> None:
    for step in range(first, last + 1):
        store.record_progress(job_id, step, 6, 100 * step)
        metrics = {"train_loss": 3.0 / step, "tokens_per_second": 1234.0}
        store.record_step(job_id, step, metrics)


def environment(server: Any) -> dict[str, str]:
    """Of a process that reaches the server, in a terminal or, as in many CIs, told to color."""
    root = str(Path(__file__).parents[2])
    base_url = f"{server.url}/v1"
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    return {**os.environ, "PYTHONPATH": root, "OPENAI_BASE_URL": base_url, **terminal}


def start(server: Any, *arguments: str) -> Any:
    """The command line as a process of its own, with pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def hear_ctrl_c() -> None:  # a suite that runs in the background does not, and hands that on
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment(server), preexec_fn=hear_ctrl_c, **pipes
    )


@pytest.fixture
def engine(server: Any) -> Callable[..., Callable[[], None]]:
    """An engine that claims one job, trains it and ends it."""

    def engine(end: str = "succeed") -> Callable[[], None]:
        def work() -> None:
            job = until(server.store.claim_next_job)
            train_steps(server.store, job.id, 1, 3)
            metrics = {"valid_loss": 0.75, "valid_mean_token_accuracy": 0.5}
            server.store.record_evaluation(job.id, 3, metrics)
            train_steps(server.store, job.id, 4, 6)
            match end:
                case "succeed":
                    server.store.succeed(job.id, job.adapter_path)
                case "fail":
                    server.store.fail(job.id, "nan_loss", "The loss is not a number")
                case "cancel":
                    server.store.request_cancel(job.id)
                    server.store.cancelled(job.id)

        return work

    return engine


def test_a_job_is_followed_in_plain_lines(run: Any, engine: Any, train: Any) -> None:
    with meanwhile(engine()):
        result = run("jobs", "create", train, "--suffix", "orders", "--follow")
    assert result.exit_code == 0
    lines = [line[21:] for line in result.out.splitlines()]  # without date and time
    messages = [line for line in lines if not line.startswith("Step")]
    assert messages[0].startswith("Created fine-tuning job: ftjob-")
    assert "Fine-tuning job started" in messages
    assert result.out.splitlines()[-1].startswith("The model is served as ft:demo:local:orders:")
    steps = [line for line in lines if line.startswith("Step")]
    # Steps share lines; what comes before something else, and the last, are always there.
    assert "Step 3/6: training loss=1.0000 (1,234 tokens/s)" in steps
    assert "Step 3/6: validation loss=0.7500" in steps
    assert steps[-1] == "Step 6/6: training loss=0.5000 (1,234 tokens/s)"
    assert "Created ftjob-" in result.err


@pytest.mark.parametrize(
    ("end", "exit_code", "message"),
    [("fail", 3, "failed: The loss is not a number"), ("cancel", 4, "was cancelled")],
)
def test_a_job_that_does_not_succeed_has_its_exit_code(
    run: Any, engine: Any, create: Any, end: str, exit_code: int, message: str
) -> None:
    job_id = create()
    with meanwhile(engine(end)):
        result = run("jobs", "show", job_id, "--follow")
    assert result.exit_code == exit_code
    assert message in result.err
    for command in ("show", "events"):  # and when it has ended before
        assert run("jobs", command, job_id, "--follow").exit_code == exit_code
    result = run("jobs", "show", job_id, "--follow", "--json")
    assert result.exit_code == exit_code
    assert json.loads(result.out.splitlines()[-1])["status"] in ("failed", "cancelled")


def test_followed_events_are_lines_each_once(
    run: Any, server: Any, engine: Any, create: Any
) -> None:
    job_id = create()
    with meanwhile(engine()):
        result = run("jobs", "events", job_id, "--follow", "--json")
    assert result.exit_code == 0
    shown = [json.loads(line) for line in result.out.splitlines()]
    stored, _ = server.store.list_events(job_id, limit=100)
    assert [event["id"] for event in shown] == [event.id for event in reversed(stored)]
    assert {event["object"] for event in shown} == {"fine_tuning.job.event"}
    plain = run("jobs", "events", job_id, "--follow").out
    assert [f"Step {step}/6: training" in plain for step in range(1, 7)] == [True] * 6


def test_json_lines_begin_and_end_with_the_job(run: Any, engine: Any, train: Any) -> None:
    with meanwhile(engine()):
        result = run("jobs", "create", train, "--follow", "--json")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert lines[0]["object"] == lines[-1]["object"] == "fine_tuning.job"
    assert lines[0]["id"] == lines[-1]["id"]
    assert (lines[0]["status"] in ("queued", "running"), lines[-1]["status"]) == (True, "succeeded")
    assert {line["object"] for line in lines[1:-1]} == {"fine_tuning.job.event"}


def test_many_events_are_read_page_by_page(run: Any, server: Any, create: Any) -> None:
    job_id = create()
    server.store.claim_next_job()
    for number in range(250):
        server.store.add_event(job_id, "info", f"number {number}")
    server.store.request_cancel(job_id)
    server.store.cancelled(job_id)
    lines = run("jobs", "events", job_id, "--follow").out.splitlines()
    numbers = [line.rpartition(" ")[2] for line in lines if " number " in line]
    assert numbers == [str(number) for number in range(250)]
    assert "cancelled" in lines[-1]


class StoppableServer:
    """An application on one port, again and again."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve during the body."""
        config = uvicorn.Config(self._app, port=self._port, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield
        server.should_exit = True
        thread.join(timeout=10)


def test_a_server_that_restarts_is_waited_for(server: Any, create: Any) -> None:
    job_id = create()
    restarted = StoppableServer(server.app)
    with restarted.running():
        server.store.claim_next_job()
        train_steps(server.store, job_id, 1, 3)
        options = ["--follow", "--json", "--base-url", restarted.url]
        process = start(server, "jobs", "events", job_id, *options)
        shown = [process.stdout.readline() for _ in range(7)]
        assert json.loads(shown[-1])["data"]["step"] == 3
    notice = process.stderr.readline()
    assert f"The server at {restarted.url} is not reachable" in notice
    assert "Trying again for 5 minutes" in notice
    train_steps(server.store, job_id, 4, 6)
    server.store.succeed(job_id, server.store.get_job(job_id).adapter_path)
    with restarted.running():
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0
    assert "The server answers again" in err
    ids = [json.loads(line)["id"] for line in (*shown, *out.splitlines())]
    stored, _ = server.store.list_events(job_id, limit=100)
    assert ids == [event.id for event in reversed(stored)]


def test_a_server_that_stays_away_is_given_up(
    run: Any, client: openai.OpenAI, create: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "PATIENCE", 0.3)
    job_id = create()
    answers = [client.fine_tuning.jobs.retrieve(job_id).to_dict()]
    gateway = FastAPI()

    @gateway.get("/v1/fine_tuning/jobs/{job_id}")
    def answer_once(job_id: str) -> Any:
        return answers.pop() if answers else Response("upstream is away", status_code=503)

    url = f"{serve(gateway)}/v1"
    began = time.monotonic()
    result = run("jobs", "show", job_id, "--follow", "--base-url", url)
    assert time.monotonic() - began < 10
    assert (result.exit_code, result.out) == (5, "")
    assert "HTTP 503: upstream is away. Trying again for 0.3 seconds" in result.err
    assert "has not answered for 0.3 seconds" in result.err
    assert f"Come back with: flexllm jobs show {job_id} --follow --base-url {url}" in result.err


def test_a_wrong_address_is_told_at_once(run: Any, server: Any) -> None:
    url = StoppableServer(server.app).url
    for command in ("show", "events"):
        result = run("jobs", command, "ftjob-1", "--follow", "--base-url", url)
        assert result.exit_code == 5
        assert "Trying again" not in result.err


def test_ctrl_c_leaves_the_job_running(server: Any, create: Any) -> None:
    job_id = create()
    process = start(server, "jobs", "show", job_id, "--follow")
    assert job_id in process.stdout.readline()  # it follows
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "\x1b" not in out  # a pipe has no bar
    assert f"The job {job_id} goes on" in errors
    assert f"Come back with: flexllm jobs show {job_id} --follow\n" in errors
    assert f"flexllm jobs cancel {job_id}" in errors
    assert "Traceback" not in errors
    assert server.store.get_job(job_id).status == "queued"


def test_a_paused_job_is_waited_for(server: Any, create: Any) -> None:
    job_id = create()
    server.store.request_pause(job_id)
    process = start(server, "jobs", "show", job_id, "--follow")
    lines = iter(process.stdout.readline, "")
    assert any("Fine-tuning job paused" in line for line in lines)
    assert process.poll() is None
    server.store.resume(job_id)
    server.store.succeed(job_id, server.store.claim_next_job().adapter_path)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0
    assert "Fine-tuning job resumed" in out


def test_a_terminal_shows_a_bar_and_curves(server: Any, engine: Any, create: Any) -> None:
    job_id = create()
    engine()()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "jobs", "show", job_id, "--follow"],
        env=environment(server),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    while select.select([ours], [], [], 30)[0]:
        try:
            output += os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert process.wait(timeout=90) == 0
    text = output.decode()
    assert "The job has successfully completed" in text
    assert "━━━━━" in text
    assert "6/6" in text
    assert "train loss" in text
    assert "█▄▂▂▁▁" in text
    assert "valid loss" in text
    assert "accuracy 50.0%" in text
    assert "The model is served as ft:demo" in text
