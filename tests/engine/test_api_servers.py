"""Several API processes beside one engine, with two tenants: adapters that are imported, merged,
deleted and trained while the server runs, as each process serves them."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import reference
import torch
from models import ALL_TARGETS, VOCAB, random_adapter, random_model
from peft import PeftModel
from peft_adapters import archive_of
from server import NAME, Server, start_job, train_file, wait_for
from transformers import AutoModelForCausalLM

ACME, BETA, READER = "sk-acme", "sk-beta", "sk-acme-reader"
ORGANIZATIONS = {ACME: ("acme", "admin"), BETA: ("beta", "admin"), READER: ("acme", "read_only")}
PROMPT = [5, 17, 200, 33, 8, 91, 250, 64]
# Seconds until every process knows of a change.
SOON = 1.0
# Tokens of an answer that lasts several times as long on any machine.
LONG = 3072


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("api-servers")
    model = random_model(
        folder / "model", heads=6, kv_heads=2, head_dim=32, inner=320, tied=True, layers=2,
        positions=LONG + 1024,
    )  # fmt: skip
    keys = folder / "keys.toml"
    keys.write_text(
        "".join(
            f'[[keys]]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
            f'organization = "{organization}"\nrole = "{role}"\n'
            for key, (organization, role) in ORGANIZATIONS.items()
        )
    )
    server = Server(
        model, folder / "log", "--enable-finetuning", "--finetuning-dir", str(folder / "store"),
        "--finetuning-keys-file", str(keys), "--api-server-count", "2",
        "--max-logprobs", str(VOCAB), "--max-model-len", str(LONG + 1024),
    )  # fmt: skip
    server.model = model
    yield server
    server.kill()


class Connections:
    """A connection to each API process, kept open (for the five seconds that uvicorn allows)."""

    def __init__(self, server: Server) -> None:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        by_process: dict[int, httpx.Client] = {}
        others = []
        deadline = time.monotonic() + 30
        while len(by_process) < 2:
            assert time.monotonic() < deadline, "only one API process takes connections"
            client = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=1))
            stream = client.get(f"{server.url}/health").extensions["network_stream"]
            _, port = stream.get_extra_info("client_addr")
            owner = next(
                p.pid for p in processes
                if any(c.raddr and c.raddr.port == port for c in p.net_connections("tcp"))
            )  # fmt: skip
            if owner in by_process:
                others.append(client)  # open, so that this process is asked less
            else:
                by_process[owner] = client
        for client in others:
            client.close()
        self._server = server
        self._clients = list(by_process.values())

    def clients(self, key: str) -> list[openai.OpenAI]:
        """For each process, the stock client with this key."""
        return [
            openai.OpenAI(
                base_url=f"{self._server.url}/v1", api_key=key, max_retries=0, http_client=client
            )
            for client in self._clients
        ]


def each(server: Server, key: str) -> list[openai.OpenAI]:
    return Connections(server).clients(key)


def post(server: Server, key: str, path: str, **content: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    response = httpx.post(f"{server.url}/v1{path}", headers=headers, timeout=60, **content)
    assert response.status_code == 200, response.text
    return response.json()


def import_adapter(server: Server, key: str, folder: Path) -> str:
    """The name under which the adapter is served."""
    files = {"file": ("adapter.tar.gz", archive_of(folder))}
    return post(server, key, "/finetuning/adapters", files=files)["id"]


def logprobs(client: openai.OpenAI, model: str) -> torch.Tensor:
    """Log-probabilities ``[VOCAB]`` of the token after the prompt."""
    choice = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=VOCAB,
        extra_body={"return_tokens_as_token_ids": True},
    ).choices[0]  # fmt: skip
    found = torch.full((VOCAB,), float("nan"))
    for token, value in choice.logprobs.top_logprobs[0].items():
        found[int(token.removeprefix("token_id:"))] = value
    return found


def peft_logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def strong_adapter(server: Server, seed: int, r: int = 8, targets: Any = ALL_TARGETS) -> Path:
    """An adapter that changes what the model says."""
    folder = server.log.parent / f"adapter-{seed}"
    return random_adapter(server.model, folder, r, targets, seed, scale=0.1)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def within_each(
    clients: list[openai.OpenAI], condition: Callable[[openai.OpenAI], bool]
) -> list[bool]:
    """For each process, whether it comes to see it soon."""
    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(lambda client: within(SOON, lambda: condition(client)), clients))


def code_of(call: Callable[[], Any]) -> tuple[int, Any]:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value.status_code, caught.value.code


def test_two_adapters_first_used_at_once_get_their_own_weights(server: Server) -> None:
    """API processes that number their adapters by themselves would give both the same id."""
    folders = {ACME: strong_adapter(server, 1), BETA: strong_adapter(server, 2, 16, ("q_proj",))}
    expected = {
        key: peft_logprobs(reference.load_peft(server.model, f)) for key, f in folders.items()
    }
    assert float((expected[ACME] - expected[BETA]).abs().max()) > 0.1
    names = {key: import_adapter(server, key, folder) for key, folder in folders.items()}
    connections = Connections(server)
    clients = {key: connections.clients(key) for key in names}
    barrier = threading.Barrier(2)

    def first_use(process: int, key: str) -> torch.Tensor:
        barrier.wait()
        return logprobs(clients[key][process], names[key])

    for processes in ((0, 1), (1, 0)):
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(first_use, processes, names))
        for key, answer in zip(names, answers, strict=True):
            assert_same(answer, expected[key])
    base = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32)
    assert_same(logprobs(clients[ACME][0], NAME), peft_logprobs(base))


def test_each_process_shows_an_adapter_to_its_tenant_alone(server: Server) -> None:
    clients = each(server, ACME)
    name = import_adapter(server, ACME, strong_adapter(server, 1))
    assert all(within_each(clients, lambda c: name in [m.id for m in c.models.list()]))
    for client in clients + each(server, READER):
        assert client.models.retrieve(name).id == name
    for client in each(server, BETA):
        assert name not in [m.id for m in client.models.list()]
        assert code_of(lambda c=client: c.models.retrieve(name)) == (404, "model_not_found")
        assert code_of(lambda c=client: logprobs(c, name)) == (404, "model_not_found")
        assert code_of(lambda c=client: c.models.delete(name)) == (404, "model_not_found")
    reader = each(server, READER)[0]
    assert code_of(lambda: reader.models.delete(name)) == (403, "insufficient_permissions")


def test_a_merge_in_the_background_is_served_with_the_weights_of_peft(server: Server) -> None:
    folders = [strong_adapter(server, 3), strong_adapter(server, 4)]
    weights = [0.7, 0.4]
    adapters = [
        {"name": import_adapter(server, ACME, folder), "weight": weight}
        for folder, weight in zip(folders, weights, strict=True)
    ]
    order = {"method": "linear", "suffix": "both", "adapters": adapters}
    merge = post(server, ACME, "/finetuning/adapters/merge", json=order)
    assert merge["status"] in ("queued", "running")

    def state() -> dict[str, Any]:
        url = f"{server.url}/v1/finetuning/adapters/merges/{merge['id']}"
        return httpx.get(url, headers={"Authorization": f"Bearer {ACME}"}).json()

    assert within(60, lambda: state()["status"] in ("succeeded", "failed"))
    merged = state()
    assert merged["status"] == "succeeded", merged
    model = reference.load_peft(server.model, folders[0])
    model.load_adapter(str(folders[1]), adapter_name="second")
    model.add_weighted_adapter(["default", "second"], weights, "merged", "linear")
    model.set_adapter("merged")
    expected = peft_logprobs(model)
    for client in each(server, ACME):
        assert_same(logprobs(client, merged["adapter"]), expected)


def test_a_stream_outlives_the_deletion_of_its_adapter(server: Server) -> None:
    client = server.client(ACME)
    name = import_adapter(server, ACME, strong_adapter(server, 1))
    kept = import_adapter(server, ACME, strong_adapter(server, 2, 16, ("q_proj",)))
    request = {
        "model": name, "prompt": PROMPT, "max_tokens": LONG, "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    clients = each(server, ACME)
    for other in clients:  # a process's first answer takes it some seconds
        logprobs(other, kept)
    undisturbed = client.completions.create(**request).choices[0].text
    stream = iter(client.completions.create(**request, stream=True))
    pieces = [next(stream) for _ in range(5)]
    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(list, stream)
        clients[0].models.delete(name)
        assert all(within_each(clients, lambda c: name not in [m.id for m in c.models.list()]))
        assert not arriving.done(), "the stream was over before"
        for client in clients:
            assert code_of(lambda c=client: c.models.retrieve(name)) == (404, "model_not_found")
            assert code_of(lambda c=client: logprobs(c, name)) == (404, "model_not_found")
            logprobs(client, kept)
        rest = arriving.result()
    text = "".join(piece.choices[0].text for piece in pieces + rest)
    assert text == undisturbed
    assert rest[-1].choices[0].finish_reason == "length"


def test_every_process_serves_files_jobs_and_the_trained_adapter_at_once(server: Server) -> None:
    client = server.client(ACME)
    line = '{"prompt": "w5 w6", "completion": " w7 w8"}'
    file_id = train_file(client, [line] * 4)
    job = start_job(client, file_id, max_steps=2, batch_size=2, learning_rate=0.05)
    job = wait_for(client, job.id)
    assert job.status == "succeeded", job.error
    folder = server.log.parent / "store" / "jobs" / job.id / "adapter"
    base = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32)
    expected = peft_logprobs(PeftModel.from_pretrained(base, str(folder)))
    for client in each(server, ACME):
        assert job.fine_tuned_model in [m.id for m in client.models.list()]
        assert client.files.retrieve(file_id).id == file_id
        assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
        assert_same(logprobs(client, job.fine_tuned_model), expected)
    for client in each(server, BETA):
        assert code_of(lambda c=client: c.files.retrieve(file_id))[0] == 404
        assert code_of(lambda c=client: c.fine_tuning.jobs.retrieve(job.id))[0] == 404
        assert job.fine_tuned_model not in [m.id for m in client.models.list()]
