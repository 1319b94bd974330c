"""Keys, organizations and roles, through the application that vLLM builds."""

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from peft_adapters import TINY_LLAMA, archive_of, save_random_adapter
from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool
from vllm_application import vllm_application

from flexllm_vllm.adapter_files.base_linears import base_linears
from flexllm_vllm.api.keys import KeyFile
from flexllm_vllm.jobs import JobStore

LINE = b'{"prompt": "a", "completion": "b"}\n'


def entry(key: str, organization: str, role: str = "member", quotas: str = "") -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return (
        f'[[keys]]\nsha256 = "{digest}"\norganization = "{organization}"\nrole = "{role}"\n'
        f"quotas = {{ {quotas} }}\n"
    )


ACME, BETA, READER, BOSS = "sk-acme", "sk-beta", "sk-reader", "sk-boss"
KEYS = (
    entry(ACME, "acme", quotas="max_jobs = 2, max_files = 3, max_scheduling_weight = 2.0")
    + entry(BETA, "beta", quotas="max_bytes = 40, max_trained_tokens = 20, max_adapters = 2")
    + entry(READER, "acme", "read_only")
    + entry(BOSS, "acme", "admin")
)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    return path


@pytest.fixture
def served(
    tmp_path: Path, keys_file: Path, serve: Callable[[FastAPI], str], toy_tokenizer: Any
) -> tuple[FastAPI, str]:
    """A server with a key of the operator and a keys file."""
    tokenizer = maybe_make_thread_pool(get_cached_tokenizer(toy_tokenizer), 1)
    flags = ["--api-key", "sk-operator", "--finetuning-keys-file", str(keys_file)]
    app = vllm_application(tmp_path / "store", flags, tokenizer)
    return app, serve(app)


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def upload(client: openai.OpenAI, content: bytes = LINE) -> str:
    return client.files.create(file=("a.jsonl", content), purpose="fine-tune").id


def finish(root: Path) -> str:
    """The oldest job succeeds; returns the name of its adapter."""
    with JobStore(root) as engine:
        job = engine.claim_next_job(models=["demo"])
        assert job is not None
        engine.succeed(job.id, job.adapter_path)
        return job.adapter_name


def chat(url: str, key: str, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)


def continuing(name: str) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"lora": {"init_from": name}}}


def test_an_organization_sees_what_is_its_own(served: tuple[FastAPI, str]) -> None:
    acme, beta = (client_of(served[1], key) for key in (ACME, BETA))
    file_id = upload(acme)
    job = acme.fine_tuning.jobs.create(model="demo", training_file=file_id)
    assert job.organization_id == "acme"
    assert [f.id for f in client_of(served[1], READER).files.list()] == [file_id]
    for call in (
        lambda: beta.files.retrieve(file_id),
        lambda: beta.files.content(file_id),
        lambda: beta.files.delete(file_id),
        lambda: beta.fine_tuning.jobs.create(model="demo", training_file=file_id),
        lambda: beta.fine_tuning.jobs.retrieve(job.id),
        lambda: beta.fine_tuning.jobs.cancel(job.id),
        lambda: beta.fine_tuning.jobs.pause(job.id),
        lambda: beta.fine_tuning.jobs.resume(job.id),
        lambda: beta.fine_tuning.jobs.list_events(job.id),
        lambda: beta.fine_tuning.jobs.checkpoints.list(job.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert list(beta.files.list()) == list(beta.fine_tuning.jobs.list()) == []
    for cursor in (
        lambda: beta.files.list(after=file_id),
        lambda: beta.fine_tuning.jobs.list(after=job.id),
    ):
        with pytest.raises(openai.BadRequestError, match="Nothing in this list"):
            cursor()


def test_adapters_are_served_to_their_organization(
    served: tuple[FastAPI, str], tmp_path: Path
) -> None:
    app, url = served
    app.state.openai_serving_chat.may_end = True
    acme, beta = (client_of(url, key) for key in (ACME, BETA))
    acme.fine_tuning.jobs.create(model="demo", training_file=upload(acme))
    name = finish(tmp_path / "store")
    assert name.startswith("ft:demo:acme::")

    assert [model.id for model in acme.models.list()] == ["demo", "static", name]
    assert [model.id for model in beta.models.list()] == ["demo", "static"]
    assert chat(url, ACME, name).text.startswith(f"data: {name}\n")
    assert chat(url, BETA, "demo").text.startswith("data: base\n")
    for key, model in ((BETA, name), ("sk-operator", name), (ACME, "ft:demo:acme::none")):
        answer = chat(url, key, model)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"The model `{model}` does not exist.")
    file_id = upload(beta)
    for options in ({"model": name}, {"model": "demo", "method": continuing(name)}):
        with pytest.raises(openai.NotFoundError) as caught:
            beta.fine_tuning.jobs.create(training_file=file_id, **options)
        assert caught.value.code == "model_not_found"


def test_a_stream_comes_piece_by_piece(served: tuple[FastAPI, str]) -> None:
    app, url = served
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    headers = {"Authorization": f"Bearer {ACME}"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
        pieces = answer.iter_text()
        assert next(pieces) == "data: base\n\n"
        app.state.openai_serving_chat.may_end = True
        assert next(pieces) == "data: [DONE]\n\n"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/tokenize", "/v1/nothing", "/x"])
def test_without_a_valid_key_there_is_nothing_to_see(
    served: tuple[FastAPI, str], path: str
) -> None:
    wrong: list[dict[str, Any]] = [
        {},
        {"Authorization": ACME},
        {"Authorization": f"Basic {ACME}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer sk-acm"},
        {"Authorization": b"Bearer \xff"},
    ]
    for headers in wrong:
        answer = httpx.get(served[1] + path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["code"] in (None, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        client_of(served[1], "sk-wrong").files.list()


def test_a_websocket_needs_a_key_too(served: tuple[FastAPI, str]) -> None:
    async def connect(headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "websocket", "path": "/v1/realtime", "root_path": "", "query_string": b"",
            "headers": headers, "extensions": {"websocket.http.response": {}}, "subprotocols": [],
        }  # fmt: skip
        await served[0](scope, receive, send)
        return sent

    refused = asyncio.run(connect([]))
    assert refused[0]["status"] == 401
    known = asyncio.run(connect([(b"authorization", b"Bearer " + ACME.encode())]))
    assert known[0].get("status") != 401


def test_roles(served: tuple[FastAPI, str]) -> None:
    app, url = served
    app.state.openai_serving_chat.may_end = True
    member, reader = client_of(url, ACME), client_of(url, READER)
    file_id = upload(member)
    assert reader.files.retrieve(file_id).id == file_id
    assert chat(url, READER, "demo").status_code == 200
    for call in (
        lambda: upload(reader),
        lambda: reader.files.delete(file_id),
        lambda: reader.fine_tuning.jobs.create(model="demo", training_file=file_id),
        lambda: reader.fine_tuning.jobs.cancel("ftjob-x"),
        lambda: reader.models.delete("ft:x"),
        lambda: member.models.delete("ft:x"),
    ):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            call()
        assert caught.value.code == "insufficient_permissions"
    adapters = f"{url}/v1/finetuning/adapters"
    for key, imports, deletes in ((READER, 403, 403), (ACME, 400, 403), (BOSS, 400, 404)):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.post(adapters, headers=headers).status_code == imports
        assert httpx.post(f"{adapters}/merge", headers=headers).status_code == imports
        assert httpx.delete(f"{adapters}/ft:x", headers=headers).status_code == deletes
    for path in ("/v1/load_lora_adapter", "/tokenizer_info", "/inference/v1/abort_requests"):
        for key, refused in ((BOSS, True), ("sk-operator", False)):
            answer = httpx.get(url + path, headers={"Authorization": f"Bearer {key}"})
            assert (answer.status_code == 403) is refused


def test_quotas_of_jobs_and_files(served: tuple[FastAPI, str]) -> None:
    acme = client_of(served[1], ACME)
    create = acme.fine_tuning.jobs.create
    file_id = upload(acme)
    jobs = [create(model="demo", training_file=file_id) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="max_jobs of 2") as caught:
        create(model="demo", training_file=file_id)
    assert (caught.value.code, caught.value.type) == ("insufficient_quota",) * 2
    assert caught.value.response.headers["x-should-retry"] == "false"
    acme.fine_tuning.jobs.cancel(jobs[0].id)
    heavy: Any = {"type": "supervised", "supervised": {"hyperparameters": {"scheduling_weight": 3}}}
    with pytest.raises(openai.BadRequestError, match=r"max_scheduling_weight of 2\.0"):
        create(model="demo", training_file=file_id, method=heavy)
    create(model="demo", training_file=file_id)
    upload(acme)
    upload(acme)
    with pytest.raises(openai.RateLimitError, match="max_files of 3"):
        upload(acme)


def test_a_repeated_upload_is_not_beyond_the_quota(served: tuple[FastAPI, str]) -> None:
    acme = client_of(served[1], ACME)
    key = acme.with_options(default_headers={"Idempotency-Key": "1"})
    first = upload(key)
    upload(acme)
    upload(acme)
    assert upload(key) == first


def test_quotas_of_bytes_and_tokens(served: tuple[FastAPI, str], tmp_path: Path) -> None:
    beta = client_of(served[1], BETA)
    with pytest.raises(openai.RateLimitError, match="max_bytes of 40"):
        upload(beta, LINE * 2)
    file_id = upload(beta)
    create = beta.fine_tuning.jobs.create
    job = create(model="demo", training_file=file_id)  # 3 epochs of 3 tokens
    create(model="demo", training_file=file_id)
    with pytest.raises(openai.RateLimitError, match=r"18 are trained or queued and this .* 9"):
        create(model="demo", training_file=file_id)
    beta.fine_tuning.jobs.cancel(job.id)  # it has trained nothing
    create(model="demo", training_file=file_id)
    assert len(list((tmp_path / "store" / "jobs").iterdir())) == 3


def test_uploads_in_parts_are_an_organizations_own(served: tuple[FastAPI, str]) -> None:
    acme, beta = client_of(served[1], ACME), client_of(served[1], BETA)
    values: Any = {"filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    with pytest.raises(openai.RateLimitError, match="max_bytes of 40"):
        beta.uploads.create(bytes=41, **values)
    content = LINE.rstrip()
    pending = beta.uploads.create(bytes=len(content), **values)
    with pytest.raises(openai.RateLimitError, match="max_bytes of 40"):
        beta.uploads.create(bytes=40, **values)
    for call in (
        lambda: acme.uploads.parts.create(pending.id, data=content),
        lambda: acme.uploads.complete(pending.id, part_ids=["part_x"]),
        lambda: acme.uploads.cancel(pending.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    part = beta.uploads.parts.create(pending.id, data=content)
    assert beta.uploads.complete(pending.id, part_ids=[part.id]).status == "completed"


def test_the_file_is_read_again_when_it_changes(
    served: tuple[FastAPI, str], keys_file: Path
) -> None:
    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{served[1]}/v1/files", headers=headers).status_code

    def write(text: str) -> None:
        partial = keys_file.with_suffix(".new")
        partial.write_text(text)
        os.replace(partial, keys_file)

    assert (status(ACME), status("sk-new")) == (200, 401)
    write(entry("sk-new", "acme"))
    assert (status(ACME), status("sk-new")) == (401, 200)
    write("[[keys]")
    assert (status(ACME), status("sk-new")) == (401, 200)
    keys_file.unlink()
    assert (status(ACME), status("sk-new"), status("sk-operator")) == (401, 200, 200)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[keys]", "is no TOML"),
        ("", "wrong at keys: "),
        ("keys = []", "wrong at keys: "),
        (entry("a", "x/y"), r"wrong at keys\.0\.organization: .*must be at most 64"),
        (entry("a", "x", "owner"), r"wrong at keys\.0\.role: "),
        (entry("a", "x", quotas="max_job = 1"), r"wrong at keys\.0\.quotas\.max_job: "),
        (entry("a", "x", quotas="max_jobs = -1"), r"wrong at keys\.0\.quotas\.max_jobs: "),
        ('[[keys]]\nsha256 = "sk-clear"\norganization = "x"', r"wrong at keys\.0\.sha256: "),
        (entry("a", "x") + entry("a", "y"), "one key twice"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        KeyFile(path)
    assert "sk-clear" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        vllm_application(tmp_path, ["--finetuning-keys-file", str(tmp_path / "none")])


def test_the_api_key_alone_works_as_ever(tmp_path: Path, serve: Callable[[FastAPI], str]) -> None:
    url = serve(vllm_application(tmp_path, ["--api-key", "one", "two"]))
    for key in ("one", "two"):
        assert list(client_of(url, key).files.list()) == []
        assert [m.id for m in client_of(url, key).models.list()] == ["demo", "static"]
    assert httpx.get(f"{url}/v1/models").json() == {"error": "Unauthorized"}  # vLLM's own
    refused = httpx.get(f"{url}/v1/files", headers={"Authorization": "Bearer three"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.post(f"{url}/tokenize", json={}).status_code == 400  # open, as ever


@pytest.mark.parametrize("path", ["/proxy/v1/files", "/v1/files"])
def test_a_root_path_opens_nothing(
    tmp_path: Path, keys_file: Path, serve: Callable[[FastAPI], str], path: str
) -> None:
    flags = ["--root-path", "/proxy", "--finetuning-keys-file", str(keys_file)]
    url = serve(vllm_application(tmp_path / "store", flags))
    assert httpx.get(url + path).status_code == 401
    headers = {"Authorization": f"Bearer {ACME}"}
    assert httpx.get(url + path, headers=headers).json()["data"] == []
    assert httpx.get(f"{url}/proxyv1/files").status_code == 401


def test_two_api_processes_read_the_same_file(
    tmp_path: Path, keys_file: Path, serve: Callable[[FastAPI], str]
) -> None:
    flags = ["--finetuning-keys-file", str(keys_file)]
    urls = [serve(vllm_application(tmp_path / "store", flags)) for _ in range(2)]
    file_id = upload(client_of(urls[0], ACME))
    assert client_of(urls[1], ACME).files.retrieve(file_id).id == file_id
    with pytest.raises(openai.NotFoundError):
        client_of(urls[1], BETA).files.retrieve(file_id)


def test_the_quota_of_adapters(served: tuple[FastAPI, str], tmp_path: Path) -> None:
    app, url = served
    app.state.finetuning_adapters.base = base_linears(TINY_LLAMA)
    archive = archive_of(save_random_adapter(tmp_path / "adapter", target_modules=["q_proj"]))

    def bring(key: str, idempotency_key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        files = {"file": ("adapter.tar.gz", archive, "application/gzip")}
        return httpx.post(f"{url}/v1/finetuning/adapters", files=files, headers=headers)

    own = [bring(BETA, "1"), bring(BETA)]
    assert [answer.status_code for answer in own] == [200, 200], own[0].text
    assert bring(BETA, "1").json() == own[0].json()  # the same one again is not one more
    adapters = [{"name": answer.json()["id"]} for answer in own]
    merge = httpx.post(
        f"{url}/v1/finetuning/adapters/merge",
        json={"adapters": adapters, "method": "linear"},
        headers={"Authorization": f"Bearer {BETA}"},
    )
    for answer in (bring(BETA), bring(BETA, "2"), merge):
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
        assert "max_adapters of 2" in answer.json()["error"]["message"]
    assert bring(ACME).status_code == 200
