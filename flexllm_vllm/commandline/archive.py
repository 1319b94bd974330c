"""An adapter's archive, as the server sends it, to a folder."""

import gzip
import os
import shutil
import tarfile
import uuid
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flexllm_vllm.commandline.errors import CommandError, ExitCode

REQUIRED = ("adapter_config.json", "adapter_model.safetensors")
MAX_FILES = 64


def check_target(target: Path, force: bool) -> None:
    """Refuse a folder that holds something already.

    Raises:
        CommandError: with the exit code of wrong usage.
    """
    if target.exists() and not target.is_dir():
        raise CommandError(f"{target} is no folder", ExitCode.USAGE)
    if not force and target.is_dir() and any(target.iterdir()):
        message = f"{target} is not empty; --force writes into it all the same"
        raise CommandError(message, ExitCode.USAGE)


def extract(archive: BinaryIO, target: Path) -> list[Path]:
    """Extract a tar.gz of plain files. Either all of them arrive in ``target``, or none.

    Files of the same name are replaced, links among them as links; others stay.

    Raises:
        CommandError: no tar.gz, an entry that is no plain file of the top folder, or no adapter.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        names = _unpack(archive, staging)
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise CommandError(f"The server's archive holds no {' and no '.join(missing)}")
        target.mkdir(exist_ok=True)
        for name in names:
            os.replace(staging / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [target / name for name in names]


def _unpack(archive: BinaryIO, folder: Path) -> list[str]:
    try:
        with gzip.GzipFile(fileobj=archive, mode="rb") as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r:") as tar:
                names = _write_files(tar, folder)
            # tar ends before the stream does; its checksum is at the very end.
            while unzipped.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CommandError(f"The server's answer is no whole tar.gz archive: {error}") from error
    return names


def _write_files(tar: tarfile.TarFile, folder: Path) -> list[str]:
    names: list[str] = []
    for member in tar:
        name = _plain_name(member)
        if name is None:
            continue
        if len(names) == MAX_FILES:
            raise CommandError(f"The server's archive holds more than {MAX_FILES} files")
        if name in names:
            raise CommandError(f"The server's archive holds {name!r} twice")
        source = tar.extractfile(member)
        assert source is not None  # a regular file
        with (folder / name).open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        names.append(name)
    return names


def _plain_name(member: tarfile.TarInfo) -> str | None:
    """The file's name; None for the top folder itself.

    Raises:
        CommandError: anything else than a regular file of the top folder.
    """
    path = PurePosixPath(member.name)
    if member.isdir() and not path.parts:
        return None
    if not member.isreg() or len(path.parts) != 1 or path.name in ("..", "") or "\\" in path.name:
        message = f"The server's archive holds {member.name!r}, which is no plain file; refused"
        raise CommandError(message)
    return path.name
