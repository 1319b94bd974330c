"""The programs of ``examples/`` as their docstrings say to run them, all on one server."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server import NAME, Server, free_port, start_job, train_file, wait_for, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LINES = (EXAMPLES / "data" / "train.jsonl").read_text().splitlines()
FEW = 8


def run(module: str, *arguments: str, **environment: str) -> str:
    """What an example prints."""
    result = subprocess.run(
        [sys.executable, "-m", f"examples.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """A new key of each of two organizations."""
    printed = run("tenants.make_keys", str(folder / "keys.toml"), "acme", "globex")
    return dict(line.split("=", 1) for line in printed.splitlines())


@pytest.fixture(scope="module")
def server(demo_model: Path, folder: Path, keys: dict[str, str]) -> Iterator[Server]:
    server = Server(
        demo_model, folder / "log", "--enable-finetuning",
        "--finetuning-dir", str(folder / "finetuning"),
        "--finetuning-keys-file", str(folder / "keys.toml"),
    )  # fmt: skip
    yield server
    server.kill()


@pytest.fixture(scope="module")
def example(server: Server, keys: dict[str, str]) -> Callable[..., str]:
    """Run an example against the server, with a key of ``acme``."""
    return lambda module, *arguments: run(
        module, *arguments, BASE_URL=f"{server.url}/v1", API_KEY=keys["acme"]
    )


def test_quickstart_and_its_tensorboard_files(
    example: Callable[..., str], tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(LINES[:FEW]))
    printed = example("quickstart", str(tmp_path / "train.jsonl"))
    assert "succeeded The job has successfully completed" in printed
    (files,) = (folder / "finetuning" / "jobs").glob("*/tensorboard")
    events = EventAccumulator(str(files))
    deadline = time.monotonic() + 20
    while not events.Reload().Tags()["scalars"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [e.step for e in events.Scalars("train/loss")] == [1]
    tags = {"train/token_accuracy", "train/learning_rate", "train/grad_norm",
            "train/tokens_per_second"}  # fmt: skip
    assert tags <= set(events.Tags()["scalars"])


def test_chat_data(example: Callable[..., str]) -> None:
    printed = example("chat_data", "--max-steps", "2")
    assert "refused at upload: Invalid file format. Line 2, field 'messages[1].role'" in printed
    assert "Step 2/2" in printed
    assert re.search(rf"^ft:{NAME}:acme:chat:\w+: .", printed, re.MULTILINE)


def test_dpo(example: Callable[..., str]) -> None:
    printed = example("dpo", "--max-steps", "3", "--batch-size", "2")
    found = re.search(r"Reward margin, first and last step: (\S+), (\S+)", printed)
    assert found
    assert float(found[2]) > float(found[1])
    assert re.search(rf"^ft:{NAME}:acme:brief:\w+: .", printed, re.MULTILINE)


def test_continuing_an_adapter(example: Callable[..., str]) -> None:
    printed = example("continue_adapter", "--examples", str(FEW))
    losses = re.findall(r"^ft:\S+: loss (\S+) to (\S+)", printed, re.MULTILINE)
    assert len(losses) == 2
    assert float(losses[1][0]) < float(losses[0][0])


def test_two_tenants(server: Server, keys: dict[str, str]) -> None:
    arguments = ("--base-url", f"{server.url}/v1", "--examples", str(FEW))
    printed = run("tenants.two_tenants", *arguments, "--keys", keys["acme"], keys["globex"])
    assert len(re.findall(r"^ft:\S+: The model `ft:\S+` does not exist", printed, re.M)) == 2


@contextmanager
def process(command: list[str], log: Path, ready: str, **options: Any) -> Iterator[None]:
    """A program for the time of a ``with``, which begins when ``ready`` answers."""
    with log.open("wb") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                if httpx.get(ready).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        running.terminate()
        running.wait(30)


@pytest.fixture(scope="module")
def nginx(server: Server, folder: Path) -> Iterator[str]:
    """The address of nginx with the configuration of the examples, but for the two ports."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    address = f"127.0.0.1:{free_port()}"
    text = (EXAMPLES / "nginx" / "nginx.conf").read_text()
    assert "127.0.0.1:8000" in text
    assert "127.0.0.1:8080" in text
    text = text.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
    prefix = folder / "nginx"
    prefix.mkdir()
    (prefix / "nginx.conf").write_text(text.replace("127.0.0.1:8080", address))
    command = [program, "-p", str(prefix), "-c", str(prefix / "nginx.conf"), "-g", "daemon off;"]
    with process(command, folder / "nginx.log", f"http://{address}/health"):
        yield f"http://{address}"


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def test_behind_nginx_keys_hold_and_only_the_api_is_there(nginx: str, keys: dict[str, str]) -> None:
    assert client_of(nginx, keys["acme"]).models.list().data[0].id == NAME
    with pytest.raises(openai.AuthenticationError) as error:
        client_of(nginx, "sk-wrong").models.list()
    assert error.value.type == "invalid_request_error"
    for path in ("/metrics", "/docs", "/openapi.json", "/load"):
        assert httpx.get(nginx + path).status_code == 404
    assert httpx.get(nginx + "/finetuning").status_code == 200


def test_behind_nginx_an_upload_reaches_the_server_while_it_is_sent(
    nginx: str, keys: dict[str, str], folder: Path
) -> None:
    data = "\n".join(LINES * 80).encode()
    assert len(data) // 2 > 1 << 20  # nginx's own limit; the server writes in blocks of that size
    head = (
        b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--xyz\r\n'
        b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    body = head + data + b"\r\n--xyz--\r\n"
    connection = http.client.HTTPConnection(nginx.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Authorization", f"Bearer {keys['acme']}")
    connection.putheader("Content-Type", "multipart/form-data; boundary=xyz")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[: len(body) // 2])
    files = folder / "finetuning" / "files"
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size for path in files.glob(".*.partial")):
        assert time.monotonic() < deadline, "nginx keeps the upload"
        time.sleep(0.05)
    connection.send(body[len(body) // 2 :])
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["bytes"] == len(data)


def test_behind_nginx_events_come_while_the_job_runs(nginx: str, keys: dict[str, str]) -> None:
    client = client_of(nginx, keys["acme"])
    job = start_job(client, train_file(client, LINES[:40]), n_epochs=50, batch_size=4)
    wait_for_step(client, job.id)
    headers = {"Authorization": f"Bearer {keys['acme']}"}
    url = f"{nginx}/v1/fine_tuning/jobs/{job.id}/events?stream=true"
    with httpx.stream("GET", url, headers=headers, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        steps = (line for line in response.iter_lines() if "training loss" in line)
        for _ in range(3):  # one at least is of a step that comes while we listen
            next(steps)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    client.fine_tuning.jobs.cancel(job.id)
    assert wait_for(client, job.id).status == "cancelled"


@pytest.fixture(scope="module")
def litellm(server: Server, keys: dict[str, str], folder: Path) -> Iterator[str]:
    """The address of LiteLLM's proxy with the configuration of the examples."""
    program = shutil.which("litellm")
    if program is None:
        pytest.skip("litellm is not on the PATH (see examples/litellm/README.md)")
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OPENAI_API_BASE": f"{server.url}/v1",
        "OPENAI_API_KEY": keys["acme"],
        "LITELLM_MASTER_KEY": "sk-master",
    }
    config = str(EXAMPLES / "litellm" / "config.yaml")
    command = [program, "--config", config, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with process(command, folder / "litellm.log", f"{url}/health/liveliness", env=environment):
        yield url


def test_through_litellm_a_job_is_created_and_its_adapter_used(litellm: str) -> None:
    tune = openai.OpenAI(base_url=f"{litellm}/openai_passthrough", api_key="sk-master")
    chat = openai.OpenAI(base_url=f"{litellm}/v1", api_key="sk-master")
    file_id = train_file(tune, LINES[:FEW])
    assert tune.files.retrieve(file_id).status == "processed"
    job = start_job(tune, file_id, suffix="gateway", n_epochs=1, batch_size=4, lora={"r": 8})
    job = wait_for(tune, job.id)
    assert job.status == "succeeded", job.error
    question: Any = [{"role": "user", "content": "Mia orders 12 lamps to Oslo."}]
    for model in (NAME, job.fine_tuned_model):
        parts = chat.chat.completions.create(
            model=model, messages=question, max_tokens=8, stream=True
        )
        assert "".join(part.choices[0].delta.content or "" for part in parts)
    with pytest.raises(openai.NotFoundError):
        tune.fine_tuning.jobs.retrieve("ftjob-none")
    for wrong in (tune, chat):
        with pytest.raises(openai.APIStatusError):
            wrong.with_options(api_key="sk-wrong", max_retries=0).models.list()
    assert tune.models.delete(job.fine_tuned_model).deleted
