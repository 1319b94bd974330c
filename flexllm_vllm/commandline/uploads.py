"""Files from here to the server."""

from pathlib import Path

import typer
from openai.types import FileObject

from flexllm_vllm.commandline.session import Session


def upload(session: Session, path: Path, purpose: str = "fine-tune") -> FileObject:
    """Upload a file.

    Raises:
        openai.APIError, OSError: refused, or not readable.
    """
    with path.open("rb") as file:
        return session.client.files.create(
            file=(path.name, file),
            purpose=purpose,  # type: ignore[arg-type]  # the server says which it takes
        )


def uploaded_id(session: Session, path_or_id: str, option: str) -> str:
    """The id of a file: that of a path is uploaded, a ``file-...`` is taken as it is.

    Raises:
        typer.BadParameter: neither a file here nor an id.
        openai.APIError, OSError: the upload is refused, or the file not readable.
    """
    path = Path(path_or_id)
    if path.is_file():
        file = upload(session, path)
        session.output.note(f"Uploaded {path} as {file.id}")
        return file.id
    if path_or_id.startswith("file-"):
        return path_or_id
    message = f"{path_or_id!r} is neither a file here nor an id (file-...)"
    raise typer.BadParameter(message, param_hint=option)
