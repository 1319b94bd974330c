"""The files of an adapter, from the server to a folder."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import openai

from flexllm_vllm.commandline.archive import check_target, extract
from flexllm_vllm.commandline.session import Session


def export_adapter(session: Session, name: str, target: Path, force: bool) -> None:
    """Write the PEFT folder of a served adapter to ``target``.

    Raises:
        CommandError, openai.APIError: ``target`` is not empty, no such adapter, a bad archive.
    """
    check_target(target, force)
    with tempfile.TemporaryFile() as archive:
        for chunk in _download(session.client, name):
            archive.write(chunk)
        archive.seek(0)
        paths = extract(archive, target)
    if session.output.as_json:
        files = [str(path) for path in paths]
        session.output.document({"adapter": name, "directory": str(target), "files": files})
    else:
        for path in paths:
            session.output.text(str(path))


def _download(client: openai.OpenAI, name: str) -> Iterator[bytes]:
    """The body as it arrives. The client's stream is made for server-sent events; of it only the
    open response is used."""
    with client.get(
        f"/finetuning/adapters/{quote(name, safe='')}/content",
        cast_to=bytes,
        stream=True,
        stream_cls=openai.Stream[bytes],
    ) as stream:
        try:
            yield from stream.response.iter_bytes()
        except Exception as error:  # of the HTTP library that the client happens to use
            raise openai.APIConnectionError(request=stream.response.request) from error
