"""Who runs a job: a lock file per engine process that the kernel releases when the process ends.

Several engines may share a store (data parallelism starts one engine per rank). A job that is
"running" was interrupted only if the engine that claimed it is gone, and a process that was killed
cannot say so itself.
"""

import fcntl
import os
import struct
import threading
from pathlib import Path
from typing import IO

from flexllm_vllm.jobs.names import new_id

# Linux's struct flock: type, whence, start, length, process.
_FLOCK = "hhqqi"


class EngineOwner:
    """The identity under which this process claims jobs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.id = new_id("engine")
        self._file: IO[bytes] | None = None
        self._holding = threading.Lock()

    def hold(self) -> str:
        """Take the lock, once; returns the id."""
        with self._holding:
            if self._file is None:
                file = (self._folder / self.id).open("wb")
                # A POSIX record lock, not flock: forked children must not keep it alive.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = file
        return self.id

    def is_alive(self, owner: str | None) -> bool:
        """Whether another process holds the lock of ``owner``."""
        if owner is None or owner == self.id:
            return False
        try:
            with (self._folder / owner).open("r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        (self._folder / owner).unlink(missing_ok=True)
        return False

    def others(self) -> list[str]:
        """Ids of the other processes that hold a lock in this folder.

        Looks without taking a lock: its owner may be about to take it.
        """
        ids = (path.name for path in self._folder.iterdir())
        return [engine for engine in ids if engine != self.id and _is_locked(self._folder / engine)]

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            (self._folder / self.id).unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _is_locked(path: Path) -> bool:
    """Whether another process has a lock on a file (``F_GETLK``)."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with path.open("rb") as file:
            found = fcntl.fcntl(file, fcntl.F_GETLK, wanted)
    except FileNotFoundError:
        return False
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)
