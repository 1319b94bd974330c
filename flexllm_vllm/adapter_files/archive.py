"""Adapters as ``tar.gz``: unpacked with distrust, packed as a stream.

Of an archive only the two files of a PEFT folder are written. It is read once, from its beginning,
in bounded memory: ``tarfile`` itself would read an extended header of any size, and follows what
the archive says about links.
"""

import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flexllm_vllm.adapter_files.config import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from flexllm_vllm.adapter_files.errors import AdapterFileError

MAX_ENTRIES = 64
_MAX_EXTENDED_HEADER_BYTES = 64 * 1024
_BLOCK = 512
_CHUNK = 1 << 20
_GZIP = 31  # zlib's window size that asks for gzip's header and checksum

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")


def extract_adapter(archive: BinaryIO, folder: Path, max_bytes: int) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of an archive into an empty
    folder, and see them on disk. The other files of the archive are passed over.

    Args:
        max_bytes: limit of all that the archive extracts to.

    Raises:
        AdapterFileError: names the member that is not allowed, or says what is missing.
    """
    members = _Members(_Inflated(archive, max_bytes))
    found: dict[str, str] = {}
    for member in members:
        path = PurePosixPath(member.name)
        if path.name in _PICKLES:
            raise AdapterFileError(
                f"{_quoted(member.name)} is a pickle, which is never loaded: save the adapter with "
                "safe_serialization=True"
            )
        if path.name not in (CONFIG_FILE, WEIGHTS_FILE):
            members.skip(member)
            continue
        if path.name in found:
            raise AdapterFileError(f"the archive holds more than one {path.name}")
        found[path.name] = str(path.parent)
        if path.name == CONFIG_FILE and member.size > MAX_CONFIG_BYTES:
            raise AdapterFileError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
        members.write(member, folder / path.name)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in found:
            raise AdapterFileError(f"the archive holds no {name}")
    if len(set(found.values())) > 1:
        raise AdapterFileError(f"{CONFIG_FILE} and {WEIGHTS_FILE} lie in different folders")


def pack(files: Iterable[tuple[str, BinaryIO]], mtime: int) -> Iterator[bytes]:
    """A ``tar.gz`` of open files, piece by piece; they are closed at its end.

    Args:
        files: name and content of each.
        mtime: Unix seconds, of all members.
    """
    deflate = zlib.compressobj(1, zlib.DEFLATED, _GZIP)
    for name, file in files:
        with file:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = os.fstat(file.fileno()).st_size, mtime, 0o644
            yield deflate.compress(info.tobuf(tarfile.PAX_FORMAT))
            left = info.size
            while left:
                data = file.read(min(left, _CHUNK))
                if not data:
                    raise OSError(f"{name} became shorter while it was read")
                left -= len(data)
                yield deflate.compress(data)
            yield deflate.compress(bytes(-info.size % _BLOCK))
    yield deflate.compress(bytes(2 * _BLOCK))
    yield deflate.flush()


@dataclass(frozen=True)
class _Member:
    """A plain file of the archive; its content is the next ``size`` bytes."""

    name: str
    size: int


class _Inflated:
    """What a gzip file holds, up to a limit."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._left = max_bytes
        self._inflate = zlib.decompressobj(_GZIP)

    def check(self, size: int) -> None:
        """Whether ``size`` more bytes are within the limit."""
        if size > self._left:
            raise AdapterFileError(f"the archive extracts to more than {self._max_bytes} bytes")

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, less only at the end."""
        data = b""
        while len(data) < size and not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._file.read(64 * 1024)
            try:
                piece = self._inflate.decompress(packed, size - len(data))
            except zlib.error as error:
                raise AdapterFileError(f"the file is no gzip archive: {error}") from None
            if not packed and not piece:
                raise AdapterFileError("the archive ends too early")
            self.check(len(piece))
            self._left -= len(piece)
            data += piece
        return data


class _Members:
    """The plain files of a tar archive, one after the other. The content of each must be taken, by
    :meth:`write` or :meth:`skip`, before the next one is asked for."""

    def __init__(self, source: _Inflated) -> None:
        self._source = source
        self._names: set[str] = set()
        self._entries = 0

    def __iter__(self) -> Iterator[_Member]:
        name, size = None, None  # from an extended header
        while (info := self._header()) is not None:
            if info.type in _PAX or info.type in _GNU_LONG:
                text = self._extended(info)
                if info.type in _PAX:
                    records = _pax_records(text)
                    name = records.get("path", name)
                    size = _size(records["size"]) if "size" in records else size
                elif info.type == tarfile.GNUTYPE_LONGNAME:
                    name = text.rstrip(b"\0").decode(errors="replace")
                continue
            member = _Member(
                info.name if name is None else name, info.size if size is None else size
            )
            name, size = None, None
            self._check(member, info)
            if info.type in _FILES:
                yield member

    def write(self, member: _Member, path: Path) -> None:
        """The content of a member, as a file."""
        with path.open("xb") as file:
            for piece in self._content(member):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def skip(self, member: _Member) -> None:
        """Pass over the content of a member."""
        for _ in self._content(member):
            pass

    def _content(self, member: _Member) -> Iterator[bytes]:
        self._source.check(member.size)
        left = member.size
        while left:
            yield self._exactly(min(left, _CHUNK))
            left -= min(left, _CHUNK)
        self._exactly(-member.size % _BLOCK)

    def _exactly(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) < size:
            raise AdapterFileError("the archive ends too early")
        return data

    def _header(self) -> tarfile.TarInfo | None:
        block = self._source.read(_BLOCK)
        if not block.strip(b"\0"):
            return None
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise AdapterFileError(f"the archive has more than {MAX_ENTRIES} entries")
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            raise AdapterFileError(f"the file is no tar archive: {error}") from None

    def _extended(self, info: tarfile.TarInfo) -> bytes:
        if not 0 <= info.size <= _MAX_EXTENDED_HEADER_BYTES:
            raise AdapterFileError(
                f"an extended header has {info.size} bytes, at most {_MAX_EXTENDED_HEADER_BYTES} "
                "are allowed"
            )
        text = self._exactly(info.size)
        self._exactly(-info.size % _BLOCK)
        return text

    def _check(self, member: _Member, info: tarfile.TarInfo) -> None:
        name = member.name
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise AdapterFileError(f"the path {_quoted(name)} leaves the archive's folder")
        if info.type not in _FILES and (info.type != tarfile.DIRTYPE or member.size):
            raise AdapterFileError(f"{_quoted(name)} is neither a plain file nor a folder")
        if member.size < 0:
            raise AdapterFileError(f"{_quoted(name)} has a negative size")
        if info.type in _FILES:
            if str(path) in self._names:
                raise AdapterFileError(f"the archive holds {_quoted(name)} twice")
            self._names.add(str(path))


def _pax_records(text: bytes) -> dict[str, str]:
    """The lines ``<length> <key>=<value>`` of an extended header; a value may hold line ends."""
    records = {}
    while text:
        digits, _, _ = text.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        record = text[len(digits) + 1 : length - 1]
        key, separator, value = record.partition(b"=")
        if not separator or text[length - 1 : length] != b"\n":
            raise AdapterFileError("the archive has an extended header that cannot be read")
        if key.startswith(b"GNU.sparse"):
            raise AdapterFileError("the archive holds a sparse file, which is not read")
        records[key.decode(errors="replace")] = value.decode(errors="replace")
        text = text[length:]
    return records


def _size(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 15:
        raise AdapterFileError("the archive has an extended header with a wrong size")
    return int(value)


def _quoted(name: str) -> str:
    return repr(name[:200])
