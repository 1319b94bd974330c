"""A folder appears under its name only when all of it is on disk."""

import os
from pathlib import Path


def publish(partial: Path, folder: Path) -> None:
    """Give a complete folder its place, on the same file system, which must be free."""
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    partial.rename(folder)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
