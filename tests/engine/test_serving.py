"""One server with finetuning, used as its users use it."""

import collections
import concurrent.futures
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from prometheus_client.parser import text_string_to_metric_families
from prompts import PROMPTS, shouting
from server import NAME, Server, generate, start_job, train_file, wait_for, wait_for_step
from transformers import AutoModelForCausalLM, AutoTokenizer

KEY = "sk-test"
MAX_SEQS = 8


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("serving")
    server = Server(
        demo_model, folder / "log", "--enable-finetuning", "--finetuning-dir",
        str(folder / "finetuning"), "--api-key", KEY, "--max-num-seqs", str(MAX_SEQS),
        "--finetuning-max-lora-rank", "16",
        # One slot for all served adapters: training must not take it.
        "--enable-lora", "--max-loras", "1",
    )  # fmt: skip
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client(KEY)


@pytest.fixture(scope="module")
def trained(client: openai.OpenAI):
    """A job that has run beside inference."""
    stop = threading.Event()

    def chat() -> None:
        while not stop.is_set():
            generate(client, PROMPTS[:2], parallel=2)

    thread = threading.Thread(target=chat)
    thread.start()
    try:
        file_id = train_file(client, shouting(40))
        job = start_job(
            client, file_id, suffix="loud", n_epochs=1, batch_size=2, learning_rate=1e-3
        )
        return wait_for(client, job.id)
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def long_job(client: openai.OpenAI):
    """A job that is running during the test."""
    job = start_job(client, train_file(client, shouting(60)), n_epochs=50, batch_size=4)
    wait_for_step(client, job.id)
    yield job
    if client.fine_tuning.jobs.retrieve(job.id).status == "running":
        client.fine_tuning.jobs.cancel(job.id)
    assert wait_for(client, job.id).status == "cancelled"


def iterations(server: Server) -> list[dict]:
    response = httpx.get(
        f"{server.url}/v1/finetuning/iterations",
        params={"last": 5000},
        headers={"Authorization": f"Bearer {KEY}"},
    )
    return response.json()["data"]


def scrape(server: Server) -> dict[str, float]:
    """The sum of each metric over its labels."""
    sums: collections.Counter[str] = collections.Counter()
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return sums


def test_a_job_succeeds_beside_inference(server: Server, trained, client) -> None:
    assert trained.status == "succeeded", trained.error
    assert trained.fine_tuned_model.startswith(f"ft:{NAME}:local:loud:")
    events = client.fine_tuning.jobs.list_events(trained.id, limit=100).data
    losses = [e.data["train_loss"] for e in events[::-1] if e.type == "metrics"]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    both = [i for i in iterations(server) if i["decode_tokens"] and i["finetuning_forward_tokens"]]
    assert both
    assert any(i["finetuning_backward_tokens"] for i in iterations(server))
    assert any(i["finetuning_loss_tokens"] for i in iterations(server))


def test_vllms_metrics_tell_what_a_job_does(
    trained, server: Server, request: pytest.FixtureRequest
) -> None:
    before = scrape(server)
    assert before["vllm:generation_tokens_total"] > 0
    assert before["vllm:finetuning_optimizer_steps_total"] >= 20
    assert before["vllm:finetuning_trained_tokens_total"] >= trained.trained_tokens
    for direction in ("forward", "backward"):
        assert before[f"vllm:finetuning_{direction}_tokens_total"] > trained.trained_tokens / 2
    assert before["vllm:finetuning_slo_iterations_total"] > 0
    assert 0 < before["vllm:finetuning_latency_model_mape"] < 2
    assert before["vllm:finetuning_jobs_running"] == 0
    assert "vllm:finetuning_job_loss" not in before
    request.getfixturevalue("long_job")
    # The event of a step is written by the engine, the metrics follow with its next outputs.
    deadline = time.monotonic() + 30
    while (during := scrape(server))["vllm:finetuning_jobs_running"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert during["vllm:finetuning_jobs_queued"] == 0
    assert during["vllm:finetuning_job_loss"] > 0
    assert during["vllm:finetuning_activation_cache_pages"] > 0
    assert (
        during["vllm:finetuning_optimizer_steps_total"]
        > before["vllm:finetuning_optimizer_steps_total"]
    )
    counters = [
        n for n in before if "finetuning" in n and n.endswith(("_total", "_bucket", "_sum"))
    ]
    assert counters
    for name in counters:
        assert during[name] >= before[name], name


def test_the_adapter_is_served_at_once(trained, client: openai.OpenAI) -> None:
    assert trained.fine_tuned_model in [m.id for m in client.models.list()]
    messages = [{"role": "user", "content": "Tell me 3 things about bees."}]
    base, loud = (
        client.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0,
            max_tokens=12,  # type: ignore
        )
        .choices[0]
        .message.content
        for model in (NAME, trained.fine_tuned_model)
    )
    assert loud is not None
    assert loud.upper() == loud
    assert base != loud


def test_base_rows_beside_adapter_rows_get_the_base_model(trained, client) -> None:
    alone = [c.text for c in generate(client, PROMPTS[:4])]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        adapter = pool.submit(generate, client, PROMPTS[4:8], trained.fine_tuned_model, 48)
        together = [c.text for c in generate(client, PROMPTS[:4])]
        loud = [c.text for c in adapter.result()]
    assert together == alone
    assert loud == [c.text for c in generate(client, PROMPTS[4:8], trained.fine_tuned_model, 48)]


def test_the_exported_adapter_gives_the_servers_logits_in_peft(
    trained, client, server: Server, demo_model: Path
) -> None:
    folder = next((server.log.parent / "finetuning" / "jobs").glob(f"{trained.id}/adapter"))
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder))
    choices = generate(client, PROMPTS, trained.fine_tuned_model, max_tokens=1)
    for prompt, choice in zip(PROMPTS, choices, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            logprobs = model(ids).logits[0, -1].log_softmax(-1)
        assert tokenizer.decode(logprobs.argmax()) == choice.text
        assert choice.logprobs.token_logprobs[0] == pytest.approx(float(logprobs.max()), abs=1e-3)


def test_stock_vllm_serves_the_exported_adapter(
    trained, client, server: Server, demo_model: Path, tmp_path: Path
) -> None:
    folder = server.log.parent / "finetuning" / "jobs" / trained.id / "adapter"
    stock = Server(
        demo_model, tmp_path / "log", "--enable-lora", "--lora-modules", f"loud={folder}"
    )
    try:
        theirs = generate(stock.client(), PROMPTS[:4], "loud")
    finally:
        stock.kill()
    ours = generate(client, PROMPTS[:4], trained.fine_tuned_model)
    assert [c.text for c in theirs] == [c.text for c in ours]


def test_a_served_adapter_answers_the_same_beside_a_job(
    trained, client: openai.OpenAI, request: pytest.FixtureRequest
) -> None:
    before = generate(client, PROMPTS[:4], trained.fine_tuned_model)
    request.getfixturevalue("long_job")
    beside = generate(client, PROMPTS[:4], trained.fine_tuned_model)
    assert [c.text for c in beside] == [c.text for c in before]


def test_a_job_continues_from_an_adapter(trained, client: openai.OpenAI) -> None:
    lines = shouting(8)
    file_id = train_file(client, lines)
    lora = {"init_from": trained.fine_tuned_model}
    job = start_job(client, file_id, lora=lora, n_epochs=1, batch_size=4)
    job = wait_for(client, job.id)
    assert job.status == "succeeded", job.error
    events = client.fine_tuning.jobs.list_events(job.id, limit=50).data
    first = min((e.data for e in events if e.type == "metrics"), key=lambda d: d["step"])
    before = client.fine_tuning.jobs.list_events(trained.id, limit=100).data
    fresh = min((e.data for e in before if e.type == "metrics"), key=lambda d: d["step"])
    assert first["train_loss"] < 0.5 * fresh["train_loss"]


def test_requests_fill_all_rows_beside_a_job(long_job, client, server: Server) -> None:
    # No more than there are rows: while requests wait for one, finetuning holds back.
    prompts = PROMPTS[:MAX_SEQS]
    choices = generate(client, prompts, max_tokens=40, parallel=len(prompts))
    assert len(choices) == MAX_SEQS
    log = iterations(server)
    assert max(i["decode_tokens"] for i in log) == MAX_SEQS
    assert any(
        i["decode_tokens"] == MAX_SEQS
        and (i["finetuning_forward_tokens"] or i["finetuning_backward_tokens"])
        for i in log
    )
    assert client.fine_tuning.jobs.retrieve(long_job.id).status == "running"


def test_prefix_cache_hits_beside_a_job_give_the_same_tokens(long_job, client) -> None:
    prompt = "Once upon a time there was a river. " * 40 + "The river was"
    first, *again = [generate(client, [prompt], max_tokens=16)[0].text for _ in range(3)]
    assert again == [first, first]


def test_a_cancelled_job_stops_training(client, server: Server) -> None:
    job = start_job(client, train_file(client, shouting(60)), n_epochs=50, batch_size=4)
    wait_for_step(client, job.id)
    client.fine_tuning.jobs.cancel(job.id)
    assert wait_for(client, job.id).status == "cancelled"
    assert generate(client, PROMPTS[:1])[0].text


def status_of(call, *args, **kwargs) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as error:
        call(*args, **kwargs)
    body = error.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return error.value.status_code, body["message"]


def test_bad_input_is_refused_and_the_server_lives_on(client: openai.OpenAI) -> None:
    good = shouting(2)
    file_id = train_file(client, good)
    assert status_of(start_job, client, file_id, model="no-such-model")[0] == 404
    assert status_of(start_job, client, "file-none")[0] in (400, 404)
    status, message = status_of(train_file, client, [good[0], '{"messages": [', good[1]])
    assert status == 400
    assert "ine 2" in message
    assert status_of(train_file, client, [])[0] == 400
    status, message = status_of(start_job, client, file_id, lora={"r": 32})
    assert status == 400
    assert "16" in message
    assert status_of(start_job, client, file_id, max_seq_length=10**6)[0] == 400
    assert status_of(start_job, client, file_id, learning_speed=3)[0] == 400
    long = json.dumps({"prompt": "a", "completion": " word" * 3000})
    job = start_job(client, train_file(client, [long, *good]), n_epochs=1, batch_size=1)
    events = client.fine_tuning.jobs.list_events(job.id, limit=50).data
    assert any("truncated" in e.message for e in events)
    client.fine_tuning.jobs.cancel(job.id)
    wait_for(client, job.id)
    assert generate(client, PROMPTS[:1])[0].text


def test_the_api_key_protects_every_route(server: Server) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/fine_tunes",
                 "/v1/finetuning/iterations"):  # fmt: skip
        assert httpx.get(server.url + path).status_code == 401


def test_an_idle_engine_sleeps(server: Server, trained) -> None:
    import time

    import psutil

    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)

    def cpu_seconds() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in processes if p.is_running())

    # vLLM's worker spins on its queue for a while after the last step.
    for _ in range(6):
        before = cpu_seconds()
        time.sleep(10)
        if cpu_seconds() - before < 0.5:
            return
    pytest.fail("the idle server keeps a core busy")


def test_the_guide_for_openais_customers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code runs as it stands there, but for the address, the key and the model."""
    guide = Path(__file__).parents[2] / "docs" / "migrate-from-openai.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    code = "".join(blocks).replace("http://localhost:8000/v1", f"{server.url}/v1")
    lines = [
        {"messages": [{"role": "user", "content": f"Order {i}?"},
                      {"role": "assistant", "content": f"Order {i} is on its way."}]}
        for i in range(12)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('"smollm"', repr(NAME)).replace("my-key", KEY), names)
    job = names["job"]
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith(f"ft:{NAME}:local:orders:")
    assert names["answer"].choices[0].message.content
    assert len(names["checkpoints"]) == 2
    assert names["results"].startswith("step,train_loss")
    assert wait_for(server.client(KEY), names["again"].id).status == "cancelled"
