"""The answer that is a file of the store."""

import os
from typing import BinaryIO

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send


class OpenedFileResponse(FileResponse):
    """A file that was opened before the answer began, so that it may be deleted or expire while it
    is sent. Closed with the answer.

    Args:
        file: on disk, at whatever position.
        filename: what the receiver may call it.
    """

    def __init__(self, file: BinaryIO, filename: str) -> None:
        self._file = file
        super().__init__(
            f"/dev/fd/{file.fileno()}",
            media_type="application/octet-stream",
            filename=filename,
            stat_result=os.fstat(file.fileno()),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)
