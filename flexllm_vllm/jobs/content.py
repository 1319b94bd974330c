"""Content on disk: a folder of plain files named by ids, and a file while it is written."""

import fcntl
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

_SUFFIX = ".partial"


class ContentFolder:
    """Files under ``folder/<id>``; one that is being written is ``folder/.<id>.partial``.

    Who writes a file holds its lock until the file has a row in the database. What has neither row
    nor lock was left by a process that died.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def path(self, content_id: str) -> Path:
        """Where the content of this id lies."""
        return self._folder / content_id

    def begin(self, content_id: str) -> "PartialFile":
        """A new file, to be written and then published or closed."""
        return PartialFile(self._folder, content_id)

    def remove(self, content_ids: Iterable[str]) -> None:
        """Remove content; what is gone already is passed over."""
        for content_id in content_ids:
            self.path(content_id).unlink(missing_ok=True)

    def remove_leftovers(self, known: Callable[[], Collection[str]]) -> int:
        """Remove what dead processes left; returns the number of files.

        ``known`` says which ids have a row now.
        """
        ids = known()
        suspects = [
            path for path in self._folder.iterdir() if path.name not in ids and path.is_file()
        ]
        return sum(_remove_if_left(path, known) for path in suspects)


class PartialFile:
    """A file while it is written. May be called from any thread.

    Attributes:
        id: of the file.
        path: where the content lies until it is published.
        size: bytes written so far.
    """

    def __init__(self, folder: Path, content_id: str) -> None:
        self.id = content_id
        self.path = folder / f".{content_id}{_SUFFIX}"
        self.size = 0
        self._published = folder / content_id
        self._file = _open_locked(self.path)
        self._kept = False
        self._lock = threading.RLock()

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            OSError: the disk is full, or broken.
            ValueError: the file was closed.
        """
        with self._lock:
            self._file.write(data)
            self.size += len(data)

    def sync(self) -> None:
        """Returns when the content is on disk."""
        with self._lock:
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Around the transaction that adds the file's row: the file stays if that ends well.

        Raises:
            ValueError: the file was closed.
        """
        with self._lock:  # nobody closes it meanwhile
            if self._file.closed:
                raise ValueError("the file is closed")
            try:
                yield
            except BaseException:
                self._published.unlink(missing_ok=True)
                raise
            self._kept = True

    def publish(self) -> None:
        """Give the file its place; to be called within the transaction."""
        with self._lock:
            self.path.rename(self._published)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # its name, too, is on disk
            finally:
                os.close(folder)

    def close(self) -> None:
        """End the writing. What was not published is removed."""
        with self._lock:
            if not self._file.closed and not self._kept:
                self.path.unlink(missing_ok=True)
            try:
                self._file.close()
            except OSError:  # what was left in the buffer did not fit: it is not wanted any more
                if self._kept:
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _open_locked(path: Path) -> BinaryIO:
    """Create a file and lock it. flock, not a POSIX record lock: that would end when the process
    closes any other descriptor of the file, as a check of its lines does."""
    while True:
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # taken for a leftover before it was locked


def _remove_if_left(path: Path, known: Callable[[], Collection[str]]) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Asked again under the lock: the row may have come since.
            if path.name in known():
                return False
            path.unlink(missing_ok=True)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False
