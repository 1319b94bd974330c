"""Merges over HTTP, done by the server's own process of PEFT."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from peft_adapters import logits, save_random_adapter, tiny_llama

from flexllm_vllm.api import merger as merger_module
from flexllm_vllm.api.limits import Limits
from flexllm_vllm.api.merger import Merger
from flexllm_vllm.jobs import JobStore, MergeSpec, MergeStatus, WeightedAdapter, disk

A, B = "ft:demo:local::aaaa", "ft:demo:local::bbbb"
BOTH = [{"name": A, "weight": 0.7}, {"name": B, "weight": 0.4}]


Merge = Callable[..., httpx.Response]


@pytest.fixture
def folders(server: Any) -> dict[str, Path]:
    """Two served adapters."""
    found = {}
    for seed, name in enumerate((A, B)):
        folder = server.store.adapters_folder / name[-4:]
        found[name] = save_random_adapter(folder, seed, target_modules=["q_proj", "up_proj"])
        server.store.adapters.add(name, folder, "demo", "import")
    return found


@pytest.fixture
def merge(server: Any) -> Merge:
    def merge(key: str | None = None, **body: Any) -> httpx.Response:
        body = {"adapters": BOTH, "method": "linear", **body}
        headers = {} if key is None else {"Idempotency-Key": key}
        return httpx.post(f"{server.url}/v1/finetuning/adapters/merge", json=body, headers=headers)

    return merge


def finished(server: Any, merge_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        answer = httpx.get(f"{server.url}/v1/finetuning/adapters/merges/{merge_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        if found["status"] in ("succeeded", "failed"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{merge_id} does not end")


def test_a_merged_adapter_is_served(
    server: Any, client: openai.OpenAI, merge: Merge, folders: dict[str, Path]
) -> None:
    answer = merge(method="ties", density=0.5, suffix="both")
    assert answer.status_code == 200, answer.text
    created = answer.json()
    assert (created["status"], created["adapter"], created["adapters"]) == ("queued", None, BOTH)
    busy = httpx.delete(f"{server.url}/v1/models/{A}")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "adapter_in_use")
    assert created["id"] in busy.json()["error"]["message"]

    done = finished(server, created["id"])
    assert (done["status"], done["error"]) == ("succeeded", None)
    name = done["adapter"]
    assert name == f"ft:demo:local:both:{created['id'].rpartition('-')[2][:8]}"
    assert client.models.retrieve(name).id == name
    adapter = httpx.get(f"{server.url}/v1/finetuning/adapters/{name}").json()
    assert (adapter["source"], adapter["r"]) == ("merge", 4)
    page = httpx.get(f"{server.url}/v1/finetuning/adapters/merges").json()
    assert ([m["id"] for m in page["data"]], page["has_more"]) == ([created["id"]], False)

    reference = PeftModel.from_pretrained(tiny_llama(), str(folders[A]), adapter_name="a")
    reference.load_adapter(str(folders[B]), adapter_name="b")
    reference.base_model.add_weighted_adapter(
        ["a", "b"], [0.7, 0.4], "merged", combination_type="ties", density=0.5
    )
    reference.set_adapter("merged")
    with torch.no_grad():
        expected = reference(torch.arange(16)[None]).logits
    merged = Path(server.store.adapters.get(name).path)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    kept = {path.name for path in server.store.adapters_folder.iterdir()}
    assert kept == {"aaaa", "bbbb", merged.name}


def test_a_merge_that_fails_says_why(server: Any, merge: Merge, folders: dict[str, Path]) -> None:
    weights = folders[B] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    done = finished(server, merge().json()["id"])
    assert (done["status"], done["adapter"]) == ("failed", None)
    assert done["error"]["code"] == "merge_failed"
    assert "Error while deserializing header" in done["error"]["message"]
    assert {path.name for path in server.store.adapters_folder.iterdir()} == {"aaaa", "bbbb"}
    assert httpx.delete(f"{server.url}/v1/models/{A}").status_code == 200


def test_a_merge_of_a_killed_process_says_so(
    server: Any, merge: Merge, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = merger_module._start

    def start_and_kill(*arguments: Any) -> Any:
        process = start(*arguments)
        process.kill()
        return process

    monkeypatch.setattr(merger_module, "_start", start_and_kill)
    done = finished(server, merge().json()["id"])
    assert done["error"]["message"] == "the process that merged was ended by signal 9"


def test_a_merge_of_a_dead_server_is_done_by_the_next(
    start_server: Callable[[], Any], server: Any, folders: dict[str, Path]
) -> None:
    spec = MergeSpec((WeightedAdapter(A, 1.0), WeightedAdapter(B, 1.0)), "linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.store.merges, "any_unfinished", lambda _: False)
        server.store.merges.create("ftmerge-x", "ft:demo:local::x", "demo", spec)
        assert server.store.merges.claim(lease_s=0) is not None  # by one that died
        start_server()
        assert finished(server, "ftmerge-x")["status"] == "succeeded"
    assert server.store.adapters.get("ft:demo:local::x") is not None


def test_a_server_that_ends_lets_its_merge_go(
    server: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of PEFT ends with it, and what it has written goes."""
    monkeypatch.setattr(server.store.merges, "any_unfinished", lambda _: False)
    processes: list[Any] = []
    start = merger_module._start

    def start_stopped(*arguments: Any) -> Any:
        processes.append(start(*arguments))
        processes[-1].send_signal(signal.SIGSTOP)  # it takes its time
        return processes[-1]

    monkeypatch.setattr(merger_module, "_start", start_stopped)
    spec = MergeSpec((WeightedAdapter(A, 1.0), WeightedAdapter(B, 1.0)), "linear")
    server.store.merges.create("ftmerge-x", "ft:demo:local::x", "demo", spec)

    async def run(store: JobStore) -> None:
        async with Merger(store, ("demo",), server.adapters.base, 32, poll_s=0.01).running():
            while not processes:
                await asyncio.sleep(0.01)

    with JobStore(server.store.root) as store:
        asyncio.run(run(store))
    found = server.store.merges.get("ftmerge-x")
    assert (found.status, found.attempts) == (MergeStatus.QUEUED, 0)
    assert processes[0].poll() == -signal.SIGKILL
    assert {path.name for path in server.store.adapters_folder.iterdir()} == {"aaaa", "bbbb"}


def test_the_process_of_peft_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("wb") as errors:
        fifo = tmp_path / "job"
        os.mkfifo(fifo)  # it waits here for what never comes
        process = merger_module._start(fifo, errors)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=180) == 1


def error_of(answer: httpx.Response, status: int = 400) -> tuple[str, str | None]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["message"], error["param"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"method": "mean"}, "method"),
        ({"method": None}, "method"),
        ({"adapters": BOTH[:1]}, "adapters"),
        ({"adapters": [BOTH[0], BOTH[0]]}, "names one adapter twice"),
        ({"adapters": [BOTH[0], {"name": B, "weight": 1e9}]}, "adapters.1.weight"),
        ({"adapters": [BOTH[0], {"name": B, "weight": "1"}]}, "adapters.1.weight"),
        ({"adapters": [BOTH[0], {"name": B, "wait": 1}]}, "adapters.1.wait"),
        ({"method": "ties"}, "density is required by the method 'ties'"),
        ({"method": "ties", "density": 0}, "density"),
        ({"method": "linear", "density": 0.5}, "density has no meaning"),
        ({"svd_rank": 4}, "svd_rank has no meaning"),
        ({"method": "svd", "majority_sign_method": "total"}, "majority_sign_method has no meaning"),
        ({"method": "svd", "svd_rank": 17}, "is 17, above the 16 columns"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"x": 1}, "Unrecognized request argument supplied: x"),
    ],
)
def test_a_request_that_has_no_meaning_is_refused(
    merge: Merge, folders: dict[str, Path], body: dict[str, Any], reason: str
) -> None:
    assert reason in error_of(merge(**body))[0]


def test_adapters_that_cannot_be_merged_are_named(
    server: Any, merge: Merge, folders: dict[str, Path]
) -> None:
    add = server.store.adapters.add
    folder = server.store.adapters_folder
    wide = save_random_adapter(folder / "wide", r=30, target_modules=["q_proj"])
    add("wide", wide, "demo", "import")
    add("foreign", folders[A], "other", "import")
    add("theirs", folders[A], "demo", "import", "theirs")
    add("gone", folder / "gone", "demo", "import")

    def with_(name: str) -> dict[str, Any]:
        return {"adapters": [BOTH[0], {"name": name}]}

    for name in ("none", "theirs"):
        assert error_of(merge(**with_(name)), 404)[1] == "adapters.1.name"
    assert error_of(merge(**with_("gone")))[1] == "adapters.1.name"
    assert "are of demo, other" in error_of(merge(**with_("foreign")))[0]
    assert "the ranks 4, 30" in error_of(merge(**with_("wide")))[0]
    assert (
        "is 34, above this server's maximum of 32"
        in error_of(merge(**with_("wide"), method="cat"))[0]
    )


def test_an_unknown_merge_is_not_found(server: Any) -> None:
    answer = httpx.get(f"{server.url}/v1/finetuning/adapters/merges/ftmerge-none")
    assert "ftmerge-none" in error_of(answer, 404)[0]


def test_a_merge_that_is_repeated_is_made_once(
    server: Any, folders: dict[str, Path], merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.store.merges, "claim", lambda **_: None)  # they wait
    first = merge("1").json()
    assert merge("1").json() == first
    assert merge("2").json()["id"] != first["id"]
    conflict = merge("1", method="cat")
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (
        409,
        "idempotency_key_in_use",
    )


def test_a_merge_needs_room_on_the_disk(
    server: Any, folders: dict[str, Path], merge: Merge
) -> None:
    used = disk.folder_bytes(server.store.root)
    server.adapters.limits = Limits(max_disk_bytes=used + 1000)
    answer = merge()
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
    assert server.store.merges.page() == ([], False)
