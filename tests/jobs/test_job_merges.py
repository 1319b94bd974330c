"""Merges in the store: one process at a time works on one, and none is lost."""

from pathlib import Path
from typing import Any

import pytest

from flexllm_vllm.jobs import (
    AdapterMerge,
    AdapterNotFoundError,
    JobStore,
    MergeNotFoundError,
    MergeSpec,
    MergeStatus,
    QuotaExceededError,
    Quotas,
    TooManyMergesError,
    WeightedAdapter,
)
from flexllm_vllm.jobs import merges as merges_module

SPEC = MergeSpec(
    (WeightedAdapter("ft:a", 1.0), WeightedAdapter("ft:b", -0.5)), "dare_ties", 0.5, seed=7
)


@pytest.fixture
def other(store: JobStore) -> Any:
    with JobStore(store.root) as other:
        yield other


@pytest.fixture(autouse=True)
def adapters(store: JobStore, tmp_path: Path) -> None:
    for name in ("ft:a", "ft:b"):
        store.adapters.add(name, tmp_path / name, "demo", "import")


def create(store: JobStore, name: str = "ft:c", **options: Any) -> AdapterMerge:
    return store.merges.create(f"ftmerge-{name}", name, "demo", SPEC, **options)


def claim(store: JobStore, **options: Any) -> AdapterMerge:
    merge = store.merges.claim(**options)
    assert merge is not None
    return merge


def test_a_merge_is_done_by_one_process(store: JobStore, other: JobStore, tmp_path: Path) -> None:
    assert store.merges.claim() is None
    created = create(store)
    assert (created.status, created.spec) == (MergeStatus.QUEUED, SPEC)
    merge = claim(other)
    assert (merge.id, merge.status) == (created.id, MergeStatus.RUNNING)
    assert store.merges.claim() is None
    create(store, "ft:d")
    assert store.merges.claim() is None  # one at a time
    assert other.merges.renew(merge)
    adapter = other.merges.succeed(merge, tmp_path / "c")
    assert adapter is not None
    assert (adapter.name, adapter.source, adapter.base_model) == ("ft:c", "merge", "demo")
    done = store.merges.get(created.id)
    assert (done.status, done.claim) == (MergeStatus.SUCCEEDED, None)
    assert done.finished_at is not None
    assert store.adapters.get("ft:c") == adapter
    assert claim(store).name == "ft:d"


def test_a_merge_of_a_dead_process_is_begun_anew(
    store: JobStore, other: JobStore, tmp_path: Path
) -> None:
    create(store)
    lost = claim(other, lease_s=0)
    merge = claim(store)
    assert (merge.id, merge.attempts) == (lost.id, 2)
    # The other one was only slow: what it brings is not taken.
    assert not other.merges.renew(lost)
    assert other.merges.succeed(lost, tmp_path / "lost") is None
    other.merges.fail(lost, "x", "x")
    other.merges.release(lost)
    assert store.merges.get(merge.id) == merge
    assert store.merges.succeed(merge, tmp_path / "c") is not None


def test_a_merge_that_ends_servers_is_given_up(store: JobStore) -> None:
    create(store)
    create(store, "ft:d")
    for attempt in (1, 2, 3):
        assert claim(store, lease_s=0).attempts == attempt
    assert claim(store).name == "ft:d"
    failed = store.merges.get("ftmerge-ft:c")
    assert failed.status is MergeStatus.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.finished_at is None) == ("server_interrupted", False)


def test_a_merge_that_is_let_go_was_no_attempt(store: JobStore) -> None:
    create(store)
    for _ in range(5):
        store.merges.release(claim(store))
    assert store.merges.get("ftmerge-ft:c").status is MergeStatus.QUEUED


def test_adapters_must_exist_and_be_the_organizations(store: JobStore) -> None:
    with pytest.raises(AdapterNotFoundError):
        create(store, organization_id="other")
    store.adapters.delete("ft:b")
    with pytest.raises(AdapterNotFoundError, match="ft:b"):
        create(store)


def test_the_number_that_waits_is_limited(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges_module, "MAX_UNFINISHED", 2)
    create(store)
    create(store, "ft:d")
    with pytest.raises(TooManyMergesError, match="2 merges"):
        create(store, "ft:e")
    store.merges.fail(claim(store), "x", "x")
    create(store, "ft:e")


def test_a_merge_belongs_to_its_organization(store: JobStore) -> None:
    create(store)
    assert [merge.name for merge in store.merges.page(organization_id="local")[0]] == ["ft:c"]
    assert store.merges.page(organization_id="other") == ([], False)
    with pytest.raises(MergeNotFoundError):
        store.merges.get("ftmerge-ft:c", "other")


def test_a_merge_for_another_model_is_left_to_its_server(store: JobStore) -> None:
    create(store)
    assert not store.merges.any_unfinished(["other"])
    assert store.merges.claim(models=["other"]) is None
    assert store.merges.any_unfinished(["demo", "alias"])
    assert claim(store, models=["demo", "alias"]).name == "ft:c"


def test_a_merge_counts_as_the_adapter_that_it_makes(store: JobStore, tmp_path: Path) -> None:
    """The two of the fixture are imports; what jobs have trained is not counted."""
    quotas = Quotas(max_adapters=3)
    create(store, quotas=quotas)
    with pytest.raises(QuotaExceededError, match="max_adapters of 3"):
        create(store, "ft:d", quotas=quotas)
    with pytest.raises(QuotaExceededError):
        store.adapters.check_quotas("local", quotas)
    store.adapters.add("ft:trained", tmp_path, "demo", "job", quotas=Quotas(max_adapters=4))
    store.merges.fail(claim(store), "merge_failed", "x")
    store.adapters.add("ft:d", tmp_path, "demo", "import", quotas=quotas)
    with pytest.raises(QuotaExceededError):
        store.adapters.add("ft:e", tmp_path, "demo", "import", quotas=quotas)
    store.adapters.check_quotas("other", quotas)
    store.adapters.delete("ft:d")
    create(store, "ft:e", quotas=quotas)
