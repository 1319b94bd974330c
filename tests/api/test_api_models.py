"""One model by its name: look and delete, by the stock client."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai.types import Model, ModelDeleted
from peft_adapters import save_random_adapter
from vllm.entrypoints.serve.engine.serving import BaseServing

from flexllm_vllm.api import adapter_removal

Upload = Callable[..., str]
SLASHED = "ft:org/demo:local:orders.v2:aB3dE5gH"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def vllms_check(server: Any, name: str) -> Any:
    """What vLLM says of a completion request for a model: an error, or None."""
    serving = BaseServing.__new__(BaseServing)
    serving.models = server.app.state.openai_serving_models
    serving.request_logger = None
    request: Any = SimpleNamespace(model=name)
    return asyncio.run(serving._check_model(request))


@pytest.fixture
def add(server: Any) -> Callable[..., Path]:
    """Serve an adapter of the store; returns its folder."""

    def add(name: str, base_model: str = "demo", organization: str = "local") -> Path:
        folder = server.store.adapters_folder / name.rpartition(":")[2]
        save_random_adapter(folder, target_modules=["q_proj"])
        server.store.adapters.add(name, folder, base_model, "import", organization)
        return folder

    return add


def test_base_models_and_the_operators_adapters_are_found(
    server: Any, client: openai.OpenAI, tmp_path: Path
) -> None:
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    config.write_text("{}")
    os.utime(config, (1_600_000_000, 1_600_000_000))
    server.app.state.openai_serving_models.base_model_paths[0].model_path = str(config.parent)
    model = client.models.retrieve("demo")
    Model.model_validate(model.model_dump(), strict=True)
    assert model == Model(id="demo", object="model", created=1_600_000_000, owned_by="vllm")
    static = client.models.retrieve("static")
    assert abs(static.created - time.time()) < 3600
    listed = {model.id: model.created for model in client.models.list()}
    assert listed == {"demo": 1_600_000_000, "alias": static.created, "static": static.created}


def test_an_adapter_with_colons_and_slashes_is_found(
    server: Any, client: openai.OpenAI, add: Callable[..., Path]
) -> None:
    add(SLASHED)
    created = server.store.adapters.get(SLASHED).created_at
    expected = Model(id=SLASHED, object="model", created=created, owned_by="vllm")
    assert client.models.retrieve(SLASHED) == expected
    listed = next(model for model in client.models.list() if model.id == SLASHED)
    assert (listed.created, listed.owned_by) == (created, "vllm")


@pytest.mark.parametrize("method", ["retrieve", "delete"])
@pytest.mark.parametrize(
    "name", ["none", SLASHED, "ft:demo:local::x:ckpt-step-1", "a/b", "é ", "a?b#c%2F"]
)
def test_an_unknown_model_is_not_found(client: openai.OpenAI, method: str, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        getattr(client.models, method)(name)
    assert caught.value.code == "model_not_found"
    assert f"'{name}'" in caught.value.message


def test_what_this_server_or_tenant_does_not_serve_is_not_found(
    client: openai.OpenAI, add: Callable[..., Path]
) -> None:
    add("ft:other:local::a", base_model="other")
    add("ft:demo:theirs::b", organization="theirs")
    for name in ("ft:other:local::a", "ft:demo:theirs::b"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        client.models.delete("ft:demo:theirs::b")


@pytest.mark.parametrize("name", ["demo", "alias", "static"])
def test_the_operators_models_are_not_deleted(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.models.delete(name)
    assert caught.value.code == "model_not_deletable"
    assert client.models.retrieve(name).id == name


def test_a_deletion_is_seen_by_every_process_and_unloads(
    server: Any, start_server: Callable[[], Any], client: openai.OpenAI, add: Callable[..., Path]
) -> None:
    folder = add(SLASHED)
    int_id = server.store.adapters.get(SLASHED).int_id
    other = start_server()
    loras = [s.app.state.openai_serving_models.lora_requests for s in (server, other)]
    assert all(SLASHED in requests for requests in loras)
    assert vllms_check(other, SLASHED) is None
    with other.client() as other_client:
        assert other_client.models.retrieve(SLASHED).id == SLASHED
        deleted = client.models.delete(SLASHED)
        assert deleted == ModelDeleted(id=SLASHED, object="model", deleted=True)
        # At once: what vLLM looks a request's model up in.
        assert not any(SLASHED in requests for requests in loras)
        for process in (server, other):
            answer = vllms_check(process, SLASHED)
            assert answer is not None
            assert answer.error.code == 404
        for who in (client, other_client):
            assert SLASHED not in [model.id for model in who.models.list()]
            with pytest.raises(openai.NotFoundError):
                who.models.retrieve(SLASHED)
            with pytest.raises(openai.NotFoundError):
                who.models.delete(SLASHED)
    assert server.engine.unloaded[0] == int_id
    wait_for(lambda: not folder.exists())


def test_the_folder_stays_while_a_request_may_load_it(
    server: Any, client: openai.OpenAI, add: Callable[..., Path]
) -> None:
    folder = add(SLASHED)
    int_id = server.store.adapters.get(SLASHED).int_id
    server.engine.in_use.add(int_id)
    client.models.delete(SLASHED)
    time.sleep(0.3)
    assert (folder / "adapter_model.safetensors").exists()
    assert server.engine.unloaded == []
    assert not (folder / ".deleted").exists()
    server.engine.in_use.clear()
    wait_for(lambda: not folder.exists())
    assert server.engine.unloaded == [int_id]
    wait_for(lambda: server.store.adapters.removable(int(time.time())) == [])


def test_a_request_that_comes_last_keeps_the_folder(
    server: Any, client: openai.OpenAI, add: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has reached the engine between the question and the closing of the folder."""
    folder = add(SLASHED)
    int_id = server.store.adapters.get(SLASHED).int_id
    close = adapter_removal.close_folder

    def close_late(path: Path) -> None:
        if not (path / ".deleted").exists():
            server.engine.in_use.add(int_id)
        close(path)

    monkeypatch.setattr(adapter_removal, "close_folder", close_late)
    client.models.delete(SLASHED)
    wait_for((folder / ".deleted").exists)
    time.sleep(0.2)
    assert (folder / "adapter_model.safetensors").exists()
    server.engine.in_use.clear()
    wait_for(lambda: not folder.exists())


def test_the_folder_stays_while_another_server_has_the_store(
    server: Any,
    client: openai.OpenAI,
    add: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = add(SLASHED)
    monkeypatch.setattr(server.store, "other_engines", lambda: 2)
    client.models.delete(SLASHED)
    time.sleep(0.2)
    assert folder.exists()
    monkeypatch.setattr(server.store, "other_engines", lambda: 1)
    wait_for(lambda: not folder.exists())


def test_what_lies_elsewhere_is_not_removed(
    server: Any, client: openai.OpenAI, tmp_path: Path
) -> None:
    folder = save_random_adapter(tmp_path / "elsewhere", target_modules=["q_proj"])
    server.store.adapters.add("ft:demo:local::a", folder, "demo", "import")
    client.models.delete("ft:demo:local::a")
    wait_for(lambda: server.store.adapters.removable(int(time.time())) == [])
    assert (folder / "adapter_model.safetensors").exists()


def test_an_engine_that_does_not_answer_does_not_keep_a_deletion(
    server: Any, client: openai.OpenAI, add: Callable[..., Path]
) -> None:
    folder = add(SLASHED)

    async def broken() -> list[set[int]]:
        raise RuntimeError("no engine")

    server.adapters.remover._adapters_in_use = broken
    assert client.models.delete(SLASHED).deleted
    time.sleep(0.2)
    assert folder.exists()  # nobody has said that no request needs it


def test_a_checkpoint_is_deleted_with_its_row(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    job = client.fine_tuning.jobs.create(model="demo", training_file=upload())
    claimed = server.store.claim_next_job()
    for step in (1, 2):
        server.store.record_checkpoint(job.id, step, claimed.folder / str(step), {"step": step})
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    name = checkpoints[1].fine_tuned_model_checkpoint
    assert client.models.retrieve(name).id == name
    assert client.models.delete(name).deleted
    left = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [c.id for c in left] == [checkpoints[0].id]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)


def test_the_folder_of_a_checkpoint_stays_while_its_job_may_go_on_from_it(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    job = client.fine_tuning.jobs.create(model="demo", training_file=upload())
    claimed = server.store.claim_next_job()
    folder = save_random_adapter(claimed.checkpoints_path / "step-1")
    (folder / "trainer_state.json").write_text("{}")
    server.store.record_checkpoint(job.id, 1, folder, {"step": 1})
    client.models.delete(server.store.list_checkpoints(job.id)[0][0].name)
    time.sleep(0.2)
    assert folder.exists()
    server.store.succeed(job.id, claimed.adapter_path)
    wait_for(lambda: not folder.exists())


def test_a_checkpoint_that_its_job_forgets_goes_when_its_state_is_gone(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    job = client.fine_tuning.jobs.create(model="demo", training_file=upload())
    claimed = server.store.claim_next_job()
    folder = save_random_adapter(claimed.checkpoints_path / "step-1")
    (folder / "trainer_state.json").write_text("{}")
    server.store.record_checkpoint(job.id, 1, folder, {"step": 1})
    server.store.forget_checkpoint(job.id, 1)
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    time.sleep(0.2)
    assert folder.exists()
    (folder / "trainer_state.json").unlink()  # there is a later one to go on from
    wait_for(lambda: not folder.exists())


def test_an_adapter_that_a_job_continues_from_is_in_use(
    client: openai.OpenAI, add: Callable[..., Path], upload: Upload
) -> None:
    add(SLASHED)
    lora = {"init_from": SLASHED}
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=upload(),
        method={"type": "supervised", "supervised": {"lora": lora}},  # type: ignore[typeddict-item]
    )
    with pytest.raises(openai.ConflictError, match=job.id) as caught:
        client.models.delete(SLASHED)
    assert caught.value.code == "adapter_in_use"
    client.fine_tuning.jobs.cancel(job.id)
    assert client.models.delete(SLASHED).deleted
