"""How much the store may still write to its disk."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from flexllm_vllm.jobs.errors import InsufficientStorageError

# Left free whatever happens, for checkpoints and the database: this, or a twentieth of the disk
# where that is less.
RESERVE_BYTES = 1 << 30
_RESERVE_SHARE = 20


class DiskSpace:
    """The disk below a folder.

    Args:
        root: the folder.
        max_bytes: limit of all that lies in it; None: only the disk is a limit.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self._root = root
        self._max_bytes = max_bytes

    def check(self, num_bytes: int = 0) -> None:
        """Whether ``num_bytes`` more fit, beside what is being written.

        Raises:
            InsufficientStorageError: they do not.
        """
        self.check_free(num_bytes)
        if self._max_bytes is not None and folder_bytes(self._root) + num_bytes > self._max_bytes:
            raise InsufficientStorageError(
                f"The finetuning folder of this server is limited to {self._max_bytes} bytes "
                "(--finetuning-max-disk-bytes): delete files that are not needed any more"
            )

    def check_free(self, num_bytes: int = 0) -> None:
        """The same for the free space of the disk alone; some microseconds.

        Raises:
            InsufficientStorageError: they do not fit.
        """
        disk = shutil.disk_usage(self._root)
        reserve = min(RESERVE_BYTES, disk.total // _RESERVE_SHARE)
        if disk.free - reserve < num_bytes:
            raise InsufficientStorageError(
                "The disk of this server is full: delete files that are not needed any more"
            )


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder that others are changing meanwhile."""
    total = 0
    folders = [os.fspath(folder)]
    while folders:
        for entry in _entries(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                with suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
