"""Import, export, list and delete adapters over HTTP."""

import errno
import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import torch
from peft_adapters import archive_of, logits, save_random_adapter
from safetensors.torch import load_file, save_file
from vllm.lora.peft_helper import PEFTHelper

from flexllm_vllm.api import adapter_service
from flexllm_vllm.api.limits import Limits
from flexllm_vllm.jobs import disk

Import = Callable[..., httpx.Response]


@pytest.fixture
def bring(server: Any) -> Import:
    """Import an archive."""

    def bring(archive: bytes, **fields: str) -> httpx.Response:
        files = {"file": ("adapter.tar.gz", archive, "application/gzip")}
        return httpx.post(f"{server.url}/v1/finetuning/adapters", files=files, data=fields)

    return bring


def url_of(server: Any, name: str, below: str = "") -> str:
    return f"{server.url}/v1/finetuning/adapters/{quote(name, safe='')}{below}"


def export(server: Any, name: str, folder: Path) -> Path:
    answer = httpx.get(url_of(server, name, "/content"))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/gzip"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
        tar.extractall(folder, filter="data")
    return folder


def test_an_adapter_of_peft_comes_and_goes(
    server: Any, client: openai.OpenAI, bring: Import, tmp_path: Path
) -> None:
    source = save_random_adapter(tmp_path / "source", r=4, target_modules=["v_proj", "q_proj"])
    (source / "README.md").write_text("read me")
    answer = bring(archive_of(source, "my-adapter/"), suffix="orders")
    assert answer.status_code == 200, answer.text
    adapter = answer.json()
    name = adapter["id"]
    assert name.startswith("ft:demo:local:orders:")
    assert abs(adapter.pop("created_at") - time.time()) < 60
    sizes = [
        (source / f).stat().st_size for f in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert adapter == {
        "id": name,
        "object": "finetuning.adapter",
        "source": "import",
        "job_id": None,
        "base_model": "demo",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bytes": sum(sizes),
        "organization_id": "local",
    }
    # It is served at once, in a folder that vLLM reads.
    lora = server.app.state.openai_serving_models.lora_requests[name]
    assert PEFTHelper.from_local_dir(lora.lora_path, None).r == 4
    assert name in [model.id for model in client.models.list()]

    exported = export(server, name, tmp_path / "exported")
    config = json.loads((exported / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert torch.equal(logits(exported), logits(source))

    assert httpx.delete(url_of(server, name)).json() == {
        "id": name,
        "object": "finetuning.adapter",
        "deleted": True,
    }
    for method, below in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        gone = httpx.request(method, url_of(server, name, below))
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert name not in [model.id for model in client.models.list()]


def test_an_adapter_of_a_job_can_be_exported(
    server: Any, client: openai.OpenAI, upload: Callable[..., str], tmp_path: Path
) -> None:
    job = client.fine_tuning.jobs.create(model="demo", training_file=upload(), suffix="a")
    claimed = server.store.claim_next_job()
    checkpoint = save_random_adapter(claimed.folder / "checkpoint", seed=5)
    (checkpoint / "optimizer.safetensors").write_bytes(b"not for export")
    server.store.record_checkpoint(job.id, 1, checkpoint, {"step": 1})
    server.store.succeed(job.id, save_random_adapter(claimed.adapter_path, seed=6))
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    for adapter, folder in ((name, claimed.adapter_path), (f"{name}:ckpt-step-1", checkpoint)):
        exported = export(server, adapter, tmp_path / adapter.rpartition(":")[2])
        assert torch.equal(logits(exported), logits(folder))
    listed = httpx.get(f"{server.url}/v1/finetuning/adapters").json()["data"]
    assert [(a["id"], a["source"], a["job_id"]) for a in listed] == [
        (name, "job", job.id),
        (f"{name}:ckpt-step-1", "checkpoint", job.id),
    ]


def test_an_import_can_be_trained_further(
    client: openai.OpenAI, bring: Import, upload: Callable[..., str], tmp_path: Path
) -> None:
    source = save_random_adapter(tmp_path / "source", target_modules=r".*\.(q|v)_proj")
    name = bring(archive_of(source)).json()["id"]
    lora: Any = {"init_from": name}
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=upload(),
        method={"type": "supervised", "supervised": {"lora": lora}},  # type: ignore[typeddict-item]
    )
    resolved = job.to_dict()["method"]["supervised"]["lora"]
    assert (resolved["r"], resolved["target_modules"]) == (4, ["q_proj", "v_proj"])


def test_lists_have_pages_and_belong_to_the_tenant(server: Any, tmp_path: Path) -> None:
    for i in range(5):
        owner = "theirs" if i == 3 else "local"
        server.store.adapters.add(f"ft:demo:{owner}::{i}", tmp_path / "x", "demo", "import", owner)

    def names(**params: Any) -> tuple[list[str], bool]:
        page = httpx.get(f"{server.url}/v1/finetuning/adapters", params=params).json()
        assert (page["first_id"], page["last_id"]) == (
            page["data"][0]["id"],
            page["data"][-1]["id"],
        )
        assert page["data"][0]["r"] is None  # there are no files
        return [adapter["id"][-1] for adapter in page["data"]], page["has_more"]

    assert names() == (["4", "2", "1", "0"], False)
    assert names(limit=2) == (["4", "2"], True)
    assert names(after="ft:demo:local::2") == (["1", "0"], False)
    assert httpx.get(url_of(server, "ft:demo:theirs::3")).status_code == 404
    assert httpx.get(url_of(server, "ft:demo:local::0", "/content")).status_code == 500


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def left(server: Any) -> list[str]:
    """What lies in the adapters' folder."""
    return [path.name for path in server.store.adapters_folder.iterdir()]


def test_a_bad_archive_is_refused_by_its_member(server: Any, bring: Import, tmp_path: Path) -> None:
    source = save_random_adapter(tmp_path / "source", target_modules=["q_proj"])
    (source / "adapter_model.bin").write_bytes(b"pickle")
    error = refused(bring(archive_of(source)))
    assert "'adapter_model.bin' is a pickle" in error["message"]
    assert (error["param"], error["code"]) == ("file", "invalid_adapter")
    assert "leaves" in refused(bring(archive_of(source, "../")))["message"]
    assert "no gzip" in refused(bring(b"PK\x03\x04"))["message"]
    assert left(server) == []


def test_a_bad_tensor_is_named(server: Any, bring: Import, tmp_path: Path) -> None:
    source = save_random_adapter(tmp_path / "source", target_modules=["q_proj"])
    tensors = load_file(source / "adapter_model.safetensors")
    wrong = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[wrong] = torch.zeros(33, 4)
    save_file(tensors, source / "adapter_model.safetensors")
    error = refused(bring(archive_of(source)))
    assert f"tensor '{wrong}' has the shape [33, 4]" in error["message"]
    assert left(server) == []


def test_a_rank_beyond_the_servers_is_refused(bring: Import, tmp_path: Path) -> None:
    source = save_random_adapter(tmp_path / "source", r=33, target_modules=["q_proj"])
    assert "--finetuning-max-lora-rank" in refused(bring(archive_of(source)))["message"]


def test_an_import_that_is_repeated_is_made_once(
    server: Any, bring: Import, tmp_path: Path
) -> None:
    archive = archive_of(save_random_adapter(tmp_path / "source", target_modules=["q_proj"]))

    def imported(**fields: str) -> httpx.Response:
        files = {"file": ("adapter.tar.gz", archive, "application/gzip")}
        url, headers = f"{server.url}/v1/finetuning/adapters", {"Idempotency-Key": "1"}
        return httpx.post(url, files=files, data=fields, headers=headers)

    first = imported(suffix="a").json()
    assert imported(suffix="a").json() == first
    assert refused(imported(suffix="b"), 409)["code"] == "idempotency_key_in_use"
    assert len(left(server)) == 1
    httpx.delete(url_of(server, first["id"]))
    assert "was deleted since" in refused(imported(suffix="a"), 409)["message"]


@pytest.mark.parametrize("room", [0, 70_000])  # none, and not for what is in it
def test_an_import_needs_room_on_the_disk(
    server: Any, bring: Import, tmp_path: Path, room: int
) -> None:
    source = save_random_adapter(tmp_path / "source", r=32)
    tensors = load_file(source / "adapter_model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, source / "adapter_model.safetensors")
    archive = archive_of(source)
    assert len(archive) < 20_000
    used = disk.folder_bytes(server.store.root)
    server.adapters.limits = Limits(max_disk_bytes=used + room)
    error = refused(bring(archive), 507)
    assert (error["code"], error["param"]) == ("insufficient_storage", None)
    assert left(server) == []


def test_a_large_archive_is_refused(
    server: Any, bring: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(server.adapters), "max_archive_bytes", 100_000)
    for size in (150_000, 400_000):  # found while it is read, and before
        error = refused(bring(bytes(size)), 413)
        assert "limit of 100000 bytes" in error["message"]
    assert left(server) == []


def test_a_full_disk_is_said(
    server: Any, bring: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_service, "extract_adapter", full)
    source = save_random_adapter(tmp_path / "source", target_modules=["q_proj"])
    assert refused(bring(archive_of(source)), 507)["code"] == "insufficient_storage"
    assert left(server) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"suffix": "a:b"}, "suffix"), ({"suffix": "x" * 65}, "suffix"), ({"name": "x"}, "name")],
)
def test_a_wrong_field_is_named(
    bring: Import, tmp_path: Path, fields: dict[str, str], param: str
) -> None:
    source = save_random_adapter(tmp_path / "source", target_modules=["q_proj"])
    assert refused(bring(archive_of(source), **fields))["param"] == param


def test_a_body_that_is_no_form_is_refused(server: Any) -> None:
    url = f"{server.url}/v1/finetuning/adapters"
    refused(httpx.post(url, json={"file": "x"}))
    assert refused(httpx.post(url, files={"suffix": "x"}))["param"] is not None
    refused(httpx.get(url, params={"limit": 0}))
    refused(httpx.get(url, params={"after": "none"}))
    assert left(server) == []


def test_an_export_goes_on_when_the_adapter_is_deleted(
    server: Any, bring: Import, tmp_path: Path
) -> None:
    source = save_random_adapter(tmp_path / "source")
    name = bring(archive_of(source)).json()["id"]
    with httpx.stream("GET", url_of(server, name, "/content")) as stream:
        httpx.delete(url_of(server, name)).raise_for_status()
        content = b"".join(stream.iter_raw())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        weights = tar.extractfile("adapter_model.safetensors")
        assert weights is not None
        assert weights.read() == (source / "adapter_model.safetensors").read_bytes()


def test_what_dead_processes_left_is_removed(
    start_server: Callable[[], Any], server: Any, tmp_path: Path
) -> None:
    folder = server.store.adapters_folder
    for name in (".upload-old", "adapter-old", ".import-new", "adapter-known"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    server.store.adapters.add("ft:demo:local::a", folder / "adapter-known", "demo", "import")
    old = time.time() - 2 * 24 * 3600
    for name in (".upload-old", "adapter-old", "adapter-known"):
        os.utime(folder / name, (old, old))
    start_server()
    deadline = time.monotonic() + 5
    while sorted(left(server)) != [".import-new", "adapter-known"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
