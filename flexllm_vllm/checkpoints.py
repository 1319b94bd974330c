"""Checkpoints on disk, as the worker writes them and the engine finds them again.

A checkpoint is a folder ``step-<N>`` below a job's ``checkpoints/``: the PEFT adapter, the
optimizer's moments (``optimizer.safetensors``) and the state of the training loop
(``trainer_state.json``) with the checksum of every file. It appears under its name only when it is
whole. One without ``trainer_state.json`` is an adapter to be served, and no more to go on from.
"""

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_PREFIX = "step-"
_UNFINISHED = ".new"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: why."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and the state of the training loop in it."""

    path: Path
    state: dict[str, Any]


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return folder / f"{_PREFIX}{step}"


def unfinished(path: Path) -> Path:
    """Where a checkpoint waits for what must be on disk before it counts."""
    return path.with_name(path.name + _UNFINISHED)


def finish(path: Path) -> None:
    """Gives an unfinished checkpoint its name, in place of an older one of the step."""
    shutil.rmtree(path, ignore_errors=True)
    unfinished(path).rename(path)
    sync(path.parent)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Adds the state and the checksums of all other files; the last file to be written."""
    sums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
    (folder / STATE_FILE).write_text(json.dumps({"state": state, "crc32": sums}))


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte of it checked.

    Raises:
        CheckpointError: a file is missing or was changed.
    """
    try:
        content = json.loads((path / STATE_FILE).read_text())
        state, sums = content["state"], content["crc32"]
        for name in (*ADAPTER_FILES, OPTIMIZER_FILE):
            if _checksum(path / name) != sums[name]:
                raise CheckpointError(f"{name} in {path.name} does not have its checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    return Checkpoint(path, state)


def newest(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that is whole, and what is wrong with those after it."""
    problems: list[CheckpointError] = []
    for step in sorted(resumable_steps(folder), reverse=True):
        try:
            return read(folder_of(folder, step)), problems
        except CheckpointError as error:
            problems.append(error)
    return None, problems


def resumable_steps(folder: Path) -> list[int]:
    """Steps whose checkpoints hold the state of training."""
    return [step for step in steps(folder) if (folder_of(folder, step) / STATE_FILE).exists()]


def strip(folder: Path, keep: set[int], adapters: set[int]) -> None:
    """Removes what nobody needs any more: all but the adapter of those in ``adapters``, others
    whole; those in ``keep`` stay as they are."""
    for step in steps(folder):
        path = folder_of(folder, step)
        if step in keep:
            continue
        if step in adapters:
            # The state first: without it the folder is no checkpoint to go on from.
            for name in (STATE_FILE, OPTIMIZER_FILE):
                (path / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what a process that ended has left half-written."""
    for path in folder.glob(f"{_PREFIX}*{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps(folder: Path) -> list[int]:
    """Steps of all checkpoints in a folder, in order."""
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value
