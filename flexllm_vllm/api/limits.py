"""How much one server takes in, and how a body is held to it while it is read."""

import asyncio
from dataclasses import dataclass

from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.jobs.content import PartialFile
from flexllm_vllm.jobs.disk import DiskSpace

# OpenAI's 64 MB, which are the stock client's 64 MiB.
MAX_PART_BYTES = 64 << 20
# Bytes after which the disk is looked at again while a body is read.
_LOOK_EVERY = 16 << 20


@dataclass(frozen=True)
class Limits:
    """What the flags allow, on the whole server; None: no limit.

    Attributes:
        max_file_bytes: size of an uploaded file.
        max_files: uploaded files, together with uploads that are not complete.
        max_disk_bytes: size of the finetuning folder.
        max_queued_jobs: jobs that wait for their start.
        max_examples: examples in a file.
    """

    max_file_bytes: int = FinetuningConfig.max_file_bytes
    max_files: int = FinetuningConfig.max_files
    max_disk_bytes: int | None = FinetuningConfig.max_disk_bytes
    max_queued_jobs: int = FinetuningConfig.max_queued_jobs
    max_examples: int = FinetuningConfig.max_examples

    @classmethod
    def from_config(cls, config: FinetuningConfig) -> "Limits":
        return cls(
            max_file_bytes=config.max_file_bytes,
            max_files=config.max_files,
            max_disk_bytes=config.max_disk_bytes,
            max_queued_jobs=config.max_queued_jobs,
            max_examples=config.max_examples,
        )


class LimitedFile:
    """A file on its way from a request to the disk. From any thread, one at a time.

    Args:
        partial: takes what is written; closed with this.
        max_bytes: its limit.
        param: the field of the request, for the error.
    """

    def __init__(self, partial: PartialFile, max_bytes: int, param: str, disk: DiskSpace) -> None:
        self.partial = partial
        self._max_bytes = max_bytes
        self._param = param
        self._disk = disk
        self._looked_at = 0

    def write(self, data: memoryview) -> None:
        """Append.

        Raises:
            ApiError: it is too large.
            InsufficientStorageError: the disk is full.
        """
        check_size(self.partial.size + len(data), self._max_bytes, self._param)
        if self.partial.size >= self._looked_at:
            self._disk.check_free(_LOOK_EVERY)
            self._looked_at = self.partial.size + _LOOK_EVERY
        self.partial.write(data)

    async def aclose(self) -> None:
        """Remove what was not kept, even if the request is cancelled meanwhile."""
        await asyncio.shield(asyncio.to_thread(self.partial.close))


def check_size(size: int, max_bytes: int, param: str) -> None:
    """Refuse what is above a limit.

    Raises:
        ApiError: 413.
    """
    if size > max_bytes:
        message = f"'{param}' is above the limit of {max_bytes} bytes"
        raise ApiError(413, message, param, "too_large")
