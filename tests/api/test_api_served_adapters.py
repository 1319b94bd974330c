"""The dictionary in which vLLM finds adapters, while others add and delete them."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from flexllm_vllm.api.adapters import ServedAdapters
from flexllm_vllm.api.tenants import current_organization
from flexllm_vllm.jobs import JobStore

STATIC = LoRARequest("static", 1, "x")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path) as store:
        yield store


@pytest.fixture
def served(store: JobStore) -> ServedAdapters:
    return ServedAdapters(store, ["demo"], {"static": STATIC})


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_listings_and_looks_of_many_threads_do_not_disturb_each_other(
    store: JobStore, served: ServedAdapters, tmp_path: Path, switching: None
) -> None:
    errors: list[BaseException] = []
    done = threading.Event()
    for i in range(400):  # a listing takes its time
        store.adapters.add(f"ft:demo:local:old:{i}", tmp_path / f"old-{i}", "demo", "import")

    def read() -> None:
        try:
            while not done.is_set():
                found = served.items()
                assert all(lora.lora_name == name for name, lora in found)
                assert "ft:demo:local:old:0" in served
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for i in range(40):
        store.adapters.add(f"ft:demo:local::{i}", tmp_path / str(i), "demo", "import")
        if i % 3 == 2:
            store.adapters.delete(f"ft:demo:local::{i - 1}")
    done.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert len(served) == 1 + 400 + 40 - 13


def test_what_was_found_can_be_taken_even_if_it_is_deleted_in_between(
    store: JobStore, served: ServedAdapters, tmp_path: Path
) -> None:
    """vLLM: ``if name in lora_requests: return lora_requests[name]``."""
    adapter = store.adapters.add("ft:demo:local::a", tmp_path, "demo", "import")
    assert adapter.name in served
    store.adapters.delete(adapter.name)
    assert served[adapter.name].lora_int_id == adapter.int_id
    assert adapter.name not in served
    with pytest.raises(KeyError):
        served[adapter.name]


def test_nothing_of_another_organization_is_given(
    store: JobStore, served: ServedAdapters, tmp_path: Path
) -> None:
    theirs = store.adapters.add("ft:demo:theirs::a", tmp_path, "demo", "import", "theirs").name
    token = current_organization.set("acme")
    try:
        assert theirs not in served
        assert list(served) == ["static"]
        with pytest.raises(KeyError):
            served[theirs]
    finally:
        current_organization.reset(token)
    assert served[theirs].lora_name == theirs


def test_vllms_own_route_unloads_in_this_process_alone(
    store: JobStore, served: ServedAdapters, tmp_path: Path
) -> None:
    name = store.adapters.add("ft:demo:local::a", tmp_path, "demo", "import").name
    assert name in served
    del served[name]
    assert list(served) == ["static"]
    assert list(ServedAdapters(store, ["demo"], {})) == [name]
    del served["static"]
    assert len(served) == 0
