"""The folder of an adapter, from its deletion to its end.

A worker that cannot load an adapter ends its engine. So a folder is closed first: engines refuse
requests for it from then on, each with an error of its own. Whoever then finds no request for the
adapter in an engine may remove the folder.
"""

import shutil
from contextlib import suppress
from pathlib import Path

from flexllm_vllm.jobs.adapter_types import FIRST_SERVED_INT_ID

_CLOSED = ".deleted"
_CONFIG = "adapter_config.json"


def close_folder(folder: Path) -> None:
    """Let engines refuse new requests for the adapter in a folder; it may be gone."""
    with suppress(FileNotFoundError):
        (folder / _CLOSED).touch()


def remove_folder(folder: Path) -> None:
    """Remove a folder that was closed. It stays closed to its end, and may be gone."""
    with suppress(FileNotFoundError):
        (folder / _CONFIG).unlink(missing_ok=True)
        shutil.rmtree(folder)


def check_folder(int_id: int, folder: Path) -> None:
    """Whether an adapter that the store has issued can be loaded; some microseconds.

    Raises:
        FileNotFoundError: it was deleted.
    """
    if int_id < FIRST_SERVED_INT_ID:
        return  # of --lora-modules: vLLM has loaded it at its start
    if (folder / _CLOSED).exists() or not (folder / _CONFIG).exists():
        raise FileNotFoundError(f"the adapter in {folder} was deleted")
