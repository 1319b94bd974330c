"""Archives that somebody brings: what is taken from them, and what is refused."""

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from flexllm_vllm.adapter_files.archive import MAX_ENTRIES, extract_adapter, pack
from flexllm_vllm.adapter_files.errors import AdapterFileError

CONFIG = b'{"r": 8}'
WEIGHTS = bytes(range(256)) * 9
GOOD = [("adapter_config.json", CONFIG), ("adapter_model.safetensors", WEIGHTS)]


def archive(*members: tuple[str, bytes] | tarfile.TarInfo, **options: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", **options) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


Extract = Callable[..., dict[str, bytes]]


@pytest.fixture
def extract(tmp_path: Path) -> Extract:
    """Extract an archive; returns what lies in the folder."""
    folder = tmp_path / "in" / "folder"
    folder.mkdir(parents=True)

    def extract(content: bytes, max_bytes: int = 1 << 20) -> dict[str, bytes]:
        extract_adapter(io.BytesIO(content), folder, max_bytes)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    yield extract
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["folder"]


@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", "a/b/"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_two_files_are_taken_and_the_others_passed_over(
    extract: Extract, prefix: str, format: int
) -> None:
    long = "n" * 90 + "é" * (20 if format != tarfile.USTAR_FORMAT else 1)
    members = [
        special(prefix + "sub", tarfile.DIRTYPE),
        (prefix + "README.md", b"read me"),
        (prefix + long, b"x" * 1000),
        *((prefix + name, data) for name, data in GOOD),
        (prefix + "optimizer.pt", b"never read"),
    ]
    assert extract(archive(*members, format=format)) == dict(GOOD)


def test_what_is_packed_can_be_extracted(extract: Extract, tmp_path: Path) -> None:
    files = []
    for name, data in GOOD:
        (tmp_path / "in" / "folder" / f"source-{name}").write_bytes(data)
        files.append((name, (tmp_path / "in" / "folder" / f"source-{name}").open("rb")))
    packed = b"".join(pack(files, 1_700_000_000))
    assert all(file.closed for _, file in files)
    found = extract(packed)
    assert [found[name] for name, _ in GOOD] == [CONFIG, WEIGHTS]
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:  # and by tar itself
        assert [(m.name, m.size, m.mtime) for m in tar] == [
            (name, len(data), 1_700_000_000) for name, data in GOOD
        ]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([*GOOD, ("../evil", b"x")], "'../evil' leaves"),
        ([*GOOD, ("a/../../evil", b"x")], "leaves"),
        ([*GOOD, ("/etc/evil", b"x")], "'/etc/evil' leaves"),
        ([*GOOD, ("..\\evil", b"x")], "leaves"),
        ([special("..", tarfile.DIRTYPE), *GOOD], "leaves"),
        ([special("adapter_config.json", tarfile.SYMTYPE, "/etc/passwd"), GOOD[1]], "neither"),
        ([special("adapter_config.json", tarfile.LNKTYPE, "README.md"), GOOD[1]], "neither"),
        ([*GOOD, special("link", tarfile.SYMTYPE, "..")], "'link' is neither"),
        ([*GOOD, special("null", tarfile.CHRTYPE)], "'null' is neither"),
        ([*GOOD, special("disk", tarfile.BLKTYPE)], "neither"),
        ([*GOOD, special("pipe", tarfile.FIFOTYPE)], "neither"),
        ([*GOOD, GOOD[0]], "'adapter_config.json' twice"),
        ([*GOOD, ("sub/adapter_config.json", b"")], "more than one adapter_config"),
        ([*GOOD, ("sub/adapter_model.safetensors", b"")], "more than one adapter_model"),
        ([("a/adapter_config.json", CONFIG), GOOD[1]], "different folders"),
        ([*GOOD, ("x", b""), ("./x", b"")], "'./x' twice"),
        ([GOOD[0]], "no adapter_model.safetensors"),
        ([GOOD[1]], "no adapter_config.json"),
        ([], "no adapter_config.json"),
        ([GOOD[0], ("adapter_model.bin", b"x")], "'adapter_model.bin' is a pickle"),
        ([*GOOD, ("adapter_model.bin", b"x")], "pickle"),
        ([*((f"f{i}", b"") for i in range(MAX_ENTRIES)), *GOOD], "more than 64 entries"),
        ([("adapter_config.json", b" " * (1 << 20) + b"{}"), GOOD[1]], "larger than 1048576"),
    ],
)
def test_a_member_that_is_not_allowed_is_named(
    extract: Extract, members: list[tuple[str, bytes]], reason: str
) -> None:
    with pytest.raises(AdapterFileError, match=reason):
        extract(archive(*members), max_bytes=4 << 20)


def test_a_bomb_ends_at_the_limit(extract: Extract) -> None:
    bomb = archive(*GOOD, ("zeros", bytes(200 << 20)))
    assert len(bomb) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError, match="more than 104857600 bytes"):
            extract(bomb, max_bytes=100 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_weights_above_the_limit_are_refused(extract: Extract) -> None:
    with pytest.raises(AdapterFileError, match="more than 1048576 bytes"):
        extract(archive(GOOD[0], ("adapter_model.safetensors", bytes(2 << 20))))


def test_what_lies_behind_the_end_is_not_extracted(extract: Extract) -> None:
    end = gzip.compress(gzip.decompress(archive(*GOOD)) + bytes(100 << 20))
    assert set(extract(end)) == {name for name, _ in GOOD}


def test_a_huge_extended_header_is_not_read(extract: Extract) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, 900 << 10
        stream = info.tobuf(tarfile.USTAR_FORMAT) + bytes(900 << 10)
        with pytest.raises(AdapterFileError, match="extended header has 921600 bytes"):
            extract(gzip.compress(stream))


def pax(records: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (b"15 path=../xx\n\x00", "cannot be read"),
        (b"14 path=../xx\n", r"'../xx' leaves"),
        (b"22 GNU.sparse.major=1\n", "sparse"),
        (b"10 size=-\n", "wrong size"),
        (b"27 size=999999999999999999\n", "wrong size"),
        (b"999999 path=x\n", "cannot be read"),
        (b"0 path=x\n", "cannot be read"),
        (b"-1 path=x\n", "cannot be read"),
        (b"nothing", "cannot be read"),
    ],
)
def test_an_extended_header_is_believed_in_nothing(
    extract: Extract, records: bytes, reason: str
) -> None:
    with pytest.raises(AdapterFileError, match=reason):
        extract(gzip.compress(pax(records) + gzip.decompress(archive(*GOOD))))


def test_a_negative_or_huge_size_is_refused(extract: Extract) -> None:
    info = tarfile.TarInfo("README.md")
    for size, reason in ((-1, "negative"), (1 << 60, "more than 1048576 bytes")):
        info.size = size
        block = info.tobuf(tarfile.GNU_FORMAT)
        with pytest.raises(AdapterFileError, match=reason):
            extract(gzip.compress(block + bytes(512)))


@pytest.mark.parametrize("cut", [1, 20, 100, 400])
def test_a_file_that_is_no_archive_is_refused(extract: Extract, cut: int) -> None:
    for content in (b"", b"PK\x03\x04", gzip.compress(b"x" * 512), archive(*GOOD)[:cut]):
        with pytest.raises(AdapterFileError, match=r"no gzip|no tar|too early|no adapter_config"):
            extract(content)
