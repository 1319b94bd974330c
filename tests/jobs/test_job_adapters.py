"""Adapters in the store: deletion, and when a folder may go."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexllm_vllm.jobs import (
    AdapterInUseError,
    AdapterNotFoundError,
    FinetuningJob,
    JobStore,
    LoraSpec,
    MergeSpec,
    WeightedAdapter,
)
from flexllm_vllm.jobs.errors import CursorNotFoundError

AddJob = Callable[..., FinetuningJob]


def succeed(store: JobStore) -> FinetuningJob:
    """The oldest queued job, at its end; a checkpoint was made on the way."""
    job = store.claim_next_job()
    assert job is not None
    store.record_checkpoint(job.id, 5, job.checkpoints_path / "5", {"step": 5})
    store.succeed(job.id, job.adapter_path)
    return store.get_job(job.id)


def removable(store: JobStore) -> list[Path]:
    return [adapter.path for adapter in store.adapters.removable(int(time.time()))]


def test_a_deleted_adapter_leaves_a_folder_to_remove(store: JobStore, add_job: AddJob) -> None:
    add_job()
    job = succeed(store)
    version = store.adapters_version()
    deleted = store.adapters.delete(job.adapter_name)
    assert deleted.path == str(job.adapter_path)
    assert store.adapters.get(job.adapter_name) is None
    assert store.adapters_version() != version
    assert removable(store) == [job.adapter_path]
    assert store.adapters.folders() == {job.adapter_path, job.checkpoints_path / "5"}
    assert store.adapters.removable(int(time.time()) - 10) == []
    store.adapters.forget_deleted(store.adapters.removable(int(time.time()))[0])
    assert removable(store) == []
    with pytest.raises(AdapterNotFoundError):
        store.adapters.delete(job.adapter_name)


def test_an_adapter_of_another_organization_is_not_found(store: JobStore, tmp_path: Path) -> None:
    store.adapters.add("ft:a", tmp_path, "demo", "import", "org-a")
    with pytest.raises(AdapterNotFoundError):
        store.adapters.delete("ft:a", "org-b")
    store.adapters.delete("ft:a", "org-a")


def test_a_checkpoint_is_forgotten_with_its_adapter(store: JobStore, add_job: AddJob) -> None:
    add_job()
    job = store.claim_next_job()
    assert job is not None
    for step in (5, 10):
        store.record_checkpoint(job.id, step, job.checkpoints_path / str(step), {"step": step})
    store.adapters.delete(f"{job.adapter_name}:ckpt-step-5")
    assert [c.step for c in store.list_checkpoints(job.id)[0]] == [10]
    assert store.checkpoint_steps(job.id) == [10]
    assert store.adapters.deleted_folders(job.id) == {job.checkpoints_path / "5"}
    # The job, which may have to go on from it, does not bring it back.
    assert removable(store) == []
    store.record_checkpoint(job.id, 5, job.checkpoints_path / "5", {"step": 5})
    assert store.checkpoint_steps(job.id) == [10]
    store.forget_checkpoint(job.id, 10)
    store.forget_checkpoint(job.id, 10)
    assert store.adapters.all() == []
    deleted = store.adapters.removable(int(time.time()))
    assert [(a.path.name, a.job_unfinished) for a in deleted] == [("10", True)]
    store.succeed(job.id, job.adapter_path)
    deleted = store.adapters.removable(int(time.time()))
    assert [(a.path.name, a.job_unfinished) for a in deleted] == [("5", False), ("10", False)]


def test_an_adapter_that_a_job_continues_from_stays(store: JobStore, add_job: AddJob) -> None:
    add_job()
    first = succeed(store)
    lora = replace(LoraSpec(), init_from=first.adapter_name)
    second = add_job(lora=lora, init_adapter_path=str(first.adapter_path))
    with pytest.raises(AdapterInUseError, match=second.id):
        store.adapters.delete(first.adapter_name)
    store.request_cancel(second.id)
    store.adapters.delete(first.adapter_name)
    with pytest.raises(AdapterNotFoundError, match=first.adapter_name):
        add_job(lora=lora, init_adapter_path=str(first.adapter_path))
    add_job(lora=replace(lora, init_from="static"), init_adapter_path="/elsewhere")


def test_an_adapter_of_a_waiting_merge_stays(store: JobStore, tmp_path: Path) -> None:
    for name in ("ft:a", "ft:b"):
        store.adapters.add(name, tmp_path / name, "demo", "import")
    spec = MergeSpec((WeightedAdapter("ft:a", 1.0), WeightedAdapter("ft:b", 0.5)), "linear")
    store.merges.create("ftmerge-1", "ft:c", "demo", spec)
    with pytest.raises(AdapterInUseError, match="ftmerge-1"):
        store.adapters.delete("ft:a")
    claimed = store.merges.claim()
    assert claimed is not None
    store.merges.fail(claimed, "merge_failed", "x")
    store.adapters.delete("ft:a")


def test_adapters_have_pages(store: JobStore, tmp_path: Path) -> None:
    names = [f"ft:{i}" for i in range(5)]
    for i, name in enumerate(names):
        store.adapters.add(name, tmp_path, "demo", "import", "even" if i % 2 == 0 else "odd")

    def page(**options: Any) -> tuple[list[str], bool]:
        adapters, more = store.adapters.page(**options)
        return [adapter.name for adapter in adapters], more

    assert page(limit=2) == (["ft:4", "ft:3"], True)
    assert page(limit=3, after="ft:3") == (["ft:2", "ft:1", "ft:0"], False)
    assert page(organization_id="odd") == (["ft:3", "ft:1"], False)
    with pytest.raises(CursorNotFoundError):
        page(after="ft:x")


ANNOUNCE_AND_SLEEP = """
import sys, time
from pathlib import Path
from flexllm_vllm.jobs import JobStore
store = JobStore(Path(sys.argv[1]))
store.announce_engine()
print("here", flush=True)
time.sleep(60)
"""


def test_engines_on_the_store_are_counted_while_they_live(store: JobStore) -> None:
    store.claim_next_job()
    store.announce_engine()  # not itself
    assert store.other_engines() == 0
    engine = subprocess.Popen(
        [sys.executable, "-c", ANNOUNCE_AND_SLEEP, str(store.root)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert engine.stdout is not None
    try:
        assert engine.stdout.readline() == "here\n"
        assert store.other_engines() == 1
        assert store.other_engines() == 1  # looking takes nothing from it
    finally:
        engine.kill()
        engine.wait()
        engine.stdout.close()
    assert store.other_engines() == 0
