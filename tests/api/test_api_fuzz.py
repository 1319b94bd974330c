"""Arbitrary bodies against every POST route: an answer in OpenAI's form, never a 5xx."""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Upload = Callable[..., str]


def fuzz(examples: int) -> settings:
    """The same examples each time, without a limit on the time of one."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


NAMES = st.sampled_from(
    [
        "model", "training_file", "validation_file", "method", "type", "supervised", "dpo", "lora",
        "hyperparameters", "n_epochs", "batch_size", "learning_rate", "max_steps", "seed", "suffix",
        "metadata", "integrations", "r", "target_modules", "init_from", "name", "url",
        "event_types", "event_type", "keep_old_secret_active_for_24_hours", "filename", "bytes",
        "purpose", "mime_type", "part_ids", "md5", "adapters", "weight", "density", "svd_rank",
        "majority_sign_method",
    ]
)  # fmt: skip
# Surrogates too: JSON can spell them, UTF-8 cannot.
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | TEXT
    | st.sampled_from(["auto", "supervised", "demo", "q_proj", "fine-tune", "\x00", "\ud800"])
    | st.sampled_from(["linear", "ties", "https://1.1.1.1/", "fine_tuning.job.failed"])
)
JSON = st.recursive(
    LEAVES,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(NAMES | TEXT, below, max_size=6),
    max_leaves=15,
)


def post_paths(app: Any) -> list[str]:
    return sorted(
        {
            re.sub(r"\{\w+(:path)?\}", "none", route.path)
            for route in app.routes
            if "finetuning" in getattr(route, "tags", []) and "POST" in route.methods
        }
    )


def assert_well_formed(answer: httpx.Response, sent: Any) -> None:
    assert answer.status_code < 500, (sent, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, sent
        assert isinstance(error["message"], str)
        assert error["message"]
        for name in ("param", "code"):
            assert error[name] is None or isinstance(error[name], str), sent


@pytest.fixture
def http(server: Any) -> Any:
    with httpx.Client(base_url=server.url, timeout=20) as http:
        yield http


def test_any_json_gets_an_answer(server: Any, http: httpx.Client) -> None:
    paths = post_paths(server.app)
    assert len(paths) >= 16

    @fuzz(250)
    @given(path=st.sampled_from(paths), body=JSON)
    def check(path: str, body: Any) -> None:
        content = json.dumps(body)
        headers = {"content-type": "application/json"}
        assert_well_formed(http.post(path, content=content, headers=headers), (path, content))

    for path in paths:  # each one at least once
        assert_well_formed(http.post(path, json={}), path)
    check()


@pytest.mark.parametrize("body", ["[" * 100_000, '{"a":' * 50_000, f'{{"seed": {"9" * 5000}}}'])
def test_a_body_that_a_parser_chokes_on_gets_an_answer(http: httpx.Client, body: str) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/fine_tuning/jobs", "/v1/fine_tunes"):
        answer = http.post(path, content=body, headers=headers)
        assert_well_formed(answer, body[:20])
        assert answer.status_code == 400


@pytest.mark.parametrize("where", ["model", "training_file", "suffix", "metadata", "init_from"])
def test_what_cannot_be_shown_is_not_stored(
    http: httpx.Client, client: openai.OpenAI, upload: Upload, where: str
) -> None:
    body: dict[str, Any] = {"model": "demo", "training_file": upload()}
    if where == "metadata":
        body["metadata"] = {"a": "\ud800"}
    elif where == "init_from":
        body["method"] = {"type": "supervised", "supervised": {"lora": {where: "\ud800"}}}
    else:
        body[where] = "\ud800"
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/fine_tuning/jobs", content=json.dumps(body), headers=headers)
    assert_well_formed(answer, body)
    assert answer.status_code == 400
    assert list(client.fine_tuning.jobs.list()) == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            "/v1/webhook_endpoints",
            {
                "url": "https://1.1.1.1/",
                "event_types": ["fine_tuning.job.failed"],
                "name": "\ud800",
            },
            "name",
        ),
        (
            "/v1/finetuning/adapters/merge",
            {"method": "linear", "adapters": [{"name": "\ud800"}, {"name": "b"}]},
            "adapters.0.name",
        ),
        (
            "/v1/uploads",
            {"bytes": 1, "filename": "a", "purpose": "fine-tune", "mime_type": "\ud800"},
            "mime_type",
        ),
        ("/v1/uploads/upload_none/complete", {"part_ids": ["\ud800"]}, "part_ids"),
    ],
)
def test_the_field_that_cannot_be_shown_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = http.post(path, content=json.dumps(body), headers=headers)
    assert_well_formed(answer, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_any_bytes_get_an_answer(server: Any, http: httpx.Client) -> None:
    types = [
        "application/json",
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "a/b",
        "",
    ]

    @fuzz(150)
    @given(
        path=st.sampled_from(post_paths(server.app)),
        content=st.binary(max_size=80) | st.binary(max_size=40).map(lambda b: b"--x\r\n" + b),
        kind=st.sampled_from(types),
    )
    def check(path: str, content: bytes, kind: str) -> None:
        answer = http.post(path, content=content, headers={"content-type": kind})
        assert_well_formed(answer, (path, content, kind))

    check()


def test_a_job_that_is_right_but_for_one_value(
    server: Any, http: httpx.Client, client: openai.OpenAI, upload: Upload
) -> None:
    file_id = upload()
    where = [
        ("model",), ("training_file",), ("suffix",), ("seed",), ("metadata",), ("method",),
        ("validation_file",), ("integrations",), ("hyperparameters",),
        ("method", "type"), ("method", "supervised"), ("method", "supervised", "lora"),
        ("method", "supervised", "hyperparameters"),
        *(("method", "supervised", "lora", n) for n in ("r", "lora_alpha", "target_modules")),
        *(("method", "supervised", "lora", n) for n in ("layers_to_transform", "init_from")),
        *(("method", "supervised", "hyperparameters", n) for n in (
            "n_epochs", "batch_size", "learning_rate", "warmup_ratio", "max_steps", "adam_beta1",
            "max_seq_length", "max_grad_norm", "scheduling_weight", "lr_scheduler_type",
        )),
    ]  # fmt: skip

    @fuzz(250)
    @given(path=st.sampled_from(where), value=JSON)
    def check(path: tuple[str, ...], value: Any) -> None:
        body: dict[str, Any] = {
            "model": "demo",
            "training_file": file_id,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {}, "lora": {}}},
        }
        target = body
        for name in path[:-1]:
            target = target[name]
        target[path[-1]] = value
        content = json.dumps(body)
        headers = {"content-type": "application/json"}
        answer = http.post("/v1/fine_tuning/jobs", content=content, headers=headers)
        assert_well_formed(answer, content)

    check()


def test_any_file_gets_an_answer(http: httpx.Client) -> None:
    @fuzz(120)
    @given(
        content=st.binary(max_size=100) | JSON.map(lambda v: json.dumps(v).encode()),
        name=st.text(max_size=20),
        purpose=st.sampled_from(["fine-tune", "batch", ""]) | st.text(max_size=10),
    )
    def check(content: bytes, name: str, purpose: str) -> None:
        try:
            request = http.build_request(
                "POST", "/v1/files", files={"file": (name, content)}, data={"purpose": purpose}
            )
        except UnicodeEncodeError:
            return
        assert_well_formed(http.send(request), (content, name, purpose))

    check()
