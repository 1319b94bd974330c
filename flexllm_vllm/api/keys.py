"""The keys file: which key belongs to which organization, and what it may do.

It holds hashes only, so that who reads it can use none of the keys.
"""

import hashlib
import hmac
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from flexllm_vllm.api.tenants import Role, Tenant
from flexllm_vllm.jobs.names import check_suffix
from flexllm_vllm.jobs.quotas import Quotas
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)


def _organization(value: str) -> str:
    check_suffix(value)  # it becomes a part of model names
    return value


_Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Quotas(_Strict):
    max_jobs: _Count | None = None
    max_files: _Count | None = None
    max_bytes: _Count | None = None
    max_adapters: _Count | None = None
    max_trained_tokens: _Count | None = None
    max_scheduling_weight: Annotated[float, Field(gt=0, le=1000)] | None = None


class _Key(_Strict):
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]
    organization: Annotated[str, AfterValidator(_organization)]
    role: Role = Role.MEMBER
    quotas: _Quotas = _Quotas()


class _File(_Strict):
    keys: Annotated[list[_Key], Field(min_length=1)]


class KeyFile:
    """The keys of a TOML file, which is read again when it has changed.

    A change that cannot be read leaves the keys as they were and is logged once.

    Raises:
        ValueError: the file cannot be read or is wrong; says where.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = _state(path)
        self._keys = _load(path)

    def find(self, key: bytes) -> Tenant | None:
        """The tenant of a key. Takes the same time whichever key matches, or none."""
        self._refresh()
        digest = hashlib.sha256(key).digest()
        found = None
        for known, tenant in self._keys:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found

    def _refresh(self) -> None:
        state = _state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = _load(self._path)
        except ValueError as error:
            logger.error("%s; the keys that were read before stay valid", error)
        else:
            logger.info("read %d keys from %s", len(self._keys), self._path)


def _state(path: Path) -> tuple[int, int, int] | None:
    """What tells one version of the file from another; None: it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _load(path: Path) -> list[tuple[bytes, Tenant]]:
    try:
        parsed = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"the keys file {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"the keys file {path} is wrong at {where}: {first['msg']}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"the keys file {path} is no TOML: {error}") from error
    keys = [
        (
            bytes.fromhex(key.sha256),
            Tenant(key.organization, key.role, Quotas(**key.quotas.model_dump())),
        )
        for key in parsed.keys
    ]
    if len({digest for digest, _ in keys}) < len(keys):
        raise ValueError(f"the keys file {path} has one key twice")
    return keys
