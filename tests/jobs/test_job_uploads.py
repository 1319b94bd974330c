import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexllm_vllm.jobs import (
    JobStore,
    TooManyFilesError,
    Upload,
    UploadMismatchError,
    UploadNotFoundError,
    UploadStateError,
    UploadStatus,
)


def create(store: JobStore, num_bytes: int = 4, **options: object) -> Upload:
    return store.uploads.create("a.jsonl", num_bytes, "fine-tune", "text/jsonl", **options)


def add(store: JobStore, upload: Upload, content: bytes) -> str:
    with store.uploads.begin_part(upload.id) as partial:
        partial.write(content)
        return store.uploads.add_part(upload.id, partial).id


def names(store: JobStore, folder: str) -> set[str]:
    return {path.name for path in (store.root / folder).iterdir()}


def test_parts_are_joined_in_the_order_that_was_asked(store: JobStore) -> None:
    upload = create(store, file_expires_after_s=3600)
    first, left_out, second = (add(store, upload, piece) for piece in (b"ab", b"xy", b"cd"))
    md5 = hashlib.md5(b"cdab").hexdigest().upper()
    done, file = store.uploads.complete(upload.id, [second, first], md5)
    assert (done.status, done.file_id) == (UploadStatus.COMPLETED, file.id)
    assert store.files.get(file.id) == file
    assert store.files.path(file.id).read_bytes() == b"cdab"
    assert (file.filename, file.bytes, file.expires_at) == ("a.jsonl", 4, file.created_at + 3600)
    assert (names(store, "uploads"), names(store, "files")) == (set(), {file.id})
    assert left_out not in names(store, "uploads")


def test_an_upload_belongs_to_a_tenant(store: JobStore) -> None:
    upload = create(store, organization_id="acme")
    part = add(store, upload, b"abcd")
    calls: list[Callable[[], object]] = [
        lambda: store.uploads.get(upload.id, "beta"),
        lambda: store.uploads.begin_part(upload.id, "beta"),
        lambda: store.uploads.complete(upload.id, [part], organization_id="beta"),
        lambda: store.uploads.cancel(upload.id, "beta"),
    ]
    for call in calls:
        with pytest.raises(UploadNotFoundError):
            call()
    _, file = store.uploads.complete(upload.id, [part], organization_id="acme")
    assert file.organization_id == "acme"


def test_only_its_own_parts_complete_an_upload(store: JobStore) -> None:
    upload, other = create(store), create(store)
    foreign = add(store, other, b"abcd")
    with pytest.raises(UploadMismatchError, match="has no part"):
        store.uploads.complete(upload.id, [foreign])
    with pytest.raises(UploadMismatchError, match="has no part"):
        store.uploads.complete(upload.id, ["../files/x"])


def test_a_part_that_comes_too_late_is_dropped(store: JobStore) -> None:
    upload = create(store)
    with store.uploads.begin_part(upload.id) as partial:
        partial.write(b"abcd")
        store.uploads.cancel(upload.id)
        with pytest.raises(UploadStateError):
            store.uploads.add_part(upload.id, partial)
    assert names(store, "uploads") == set()


def test_an_upload_that_ends_while_it_is_completed_makes_no_file(store: JobStore) -> None:
    upload = create(store)
    part = add(store, upload, b"abcd")

    def cancel(_path: Path) -> None:
        store.uploads.cancel(upload.id)

    with pytest.raises(UploadStateError, match="cancelled"):
        store.uploads.complete(upload.id, [part], check=cancel)
    assert store.files.page() == ([], False)
    assert (names(store, "uploads"), names(store, "files")) == (set(), set())


def test_parts_that_vanish_while_they_are_joined(store: JobStore) -> None:
    upload = create(store, 6)
    parts = [add(store, upload, piece) for piece in (b"abc", b"def")]
    (store.root / "uploads" / parts[1]).unlink()
    with pytest.raises(UploadMismatchError, match="gone"):
        store.uploads.complete(upload.id, parts)
    assert names(store, "files") == set()


def test_of_several_completions_one_makes_the_file(store: JobStore) -> None:
    upload = create(store)
    part = add(store, upload, b"abcd")
    together = threading.Barrier(4)

    def complete(_i: int) -> bool:
        try:
            store.uploads.complete(upload.id, [part], check=lambda _path: together.wait(10))
        except UploadStateError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(complete, range(4))) == 1
    files, _ = store.files.page()
    assert names(store, "files") == {file.id for file in files}
    assert len(files) == 1


def test_parts_of_an_upload_that_expires_go(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = create(store)
    add(store, upload, b"abcd")
    store.sweep()
    assert len(names(store, "uploads")) == 1
    monkeypatch.setattr(time, "time", lambda: float(upload.expires_at))
    assert store.uploads.get(upload.id).status is UploadStatus.EXPIRED
    store.sweep()
    assert names(store, "uploads") == set()
    assert store.uploads.get(upload.id).status is UploadStatus.EXPIRED
    monkeypatch.setattr(time, "time", lambda: float(upload.expires_at + 24 * 3600))
    store.sweep()
    with pytest.raises(UploadNotFoundError):
        store.uploads.get(upload.id)


def test_uploads_count_as_files_while_they_are_pending(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = create(store, max_files=1)
    with pytest.raises(TooManyFilesError):
        create(store, max_files=1)
    with pytest.raises(TooManyFilesError):
        store.files.check_count(1)
    part = add(store, upload, b"abcd")
    store.uploads.complete(upload.id, [part])
    with pytest.raises(TooManyFilesError):
        create(store, max_files=1)
    last = create(store, max_files=2)
    monkeypatch.setattr(time, "time", lambda: float(last.expires_at))
    create(store, max_files=2)


def test_the_number_of_parts_is_limited(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexllm_vllm.jobs.uploads.MAX_PARTS", 2)
    upload = create(store)
    add(store, upload, b"a")
    add(store, upload, b"b")
    with pytest.raises(UploadMismatchError, match="at most 2 parts"):
        add(store, upload, b"c")
    assert len(names(store, "uploads")) == 2


def test_cleaning_up_leaves_what_is_being_written(store: JobStore) -> None:
    upload = create(store)
    part = add(store, upload, b"ab")
    for folder in ("files", "uploads"):
        (store.root / folder / ".left.partial").write_bytes(b"x")
        (store.root / folder / "left").write_bytes(b"x")
    with store.files.begin() as file, store.uploads.begin_part(upload.id) as writing:
        file.write(b"abcd")
        writing.write(b"cd")
        with JobStore(store.root) as other:  # another process of the same server starts
            other.clean_up()
        assert names(store, "files") == {file.path.name}
        assert names(store, "uploads") == {part, writing.path.name}
        stored = store.files.add(file, "a", "fine-tune")
        second = store.uploads.add_part(upload.id, writing).id
    store.clean_up()
    assert names(store, "files") == {stored.id}
    assert names(store, "uploads") == {part, second}


def test_a_file_that_is_closed_takes_nothing(store: JobStore) -> None:
    partial = store.files.begin()
    partial.close()
    partial.close()
    with pytest.raises(ValueError):
        partial.write(b"x")
    with pytest.raises(ValueError):
        store.files.add(partial, "a", "fine-tune")
    assert store.files.page() == ([], False)
    assert names(store, "files") == set()


def test_a_file_whose_row_is_refused_leaves_nothing(store: JobStore) -> None:
    def refuse(_connection: object, _file: object) -> None:
        raise RuntimeError("refused")

    with store.files.begin() as partial:
        partial.write(b"x")
        with pytest.raises(RuntimeError, match="refused"):
            store.files.add(partial, "a", "fine-tune", within=refuse)
        partial.publish()
        with pytest.raises(RuntimeError, match="refused"):  # and once it has its place
            store.files.add(partial, "a", "fine-tune", within=refuse)
    assert store.files.page() == ([], False)
    assert names(store, "files") == set()


def test_a_file_is_not_closed_while_its_row_is_stored(store: JobStore) -> None:
    closing: list[threading.Thread] = []

    def close_meanwhile(_connection: object, _file: object) -> None:
        closing.append(threading.Thread(target=partial.close))
        closing[0].start()
        closing[0].join(0.05)
        assert closing[0].is_alive()

    partial = store.files.begin()
    partial.write(b"x")
    file = store.files.add(partial, "a", "fine-tune", within=close_meanwhile)
    closing[0].join()
    assert store.files.path(file.id).read_bytes() == b"x"
