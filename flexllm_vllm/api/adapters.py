"""Trained adapters among the models that vLLM serves.

vLLM finds an adapter by name in ``OpenAIServingModels.lora_requests``, a dictionary of one API
process. Here that dictionary follows the store, so that every API process serves a finished adapter
at once, under the integer id that the store has issued. On a server with tenants it holds, for the
task of a request, the adapters of the request's organization only.
"""

import threading
import time
from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from flexllm_vllm.api.tenants import current_organization
from flexllm_vllm.jobs.adapter_types import ServedAdapter
from flexllm_vllm.jobs.store import JobStore

PREFIX = "ft:"
_STARTED = int(time.time())


@dataclass(frozen=True)
class _Stored:
    """The adapters of the store at one version of it. Never changed, so that any thread may read
    it while another one puts the next in its place."""

    version: tuple[int, int] | None = None
    loras: Mapping[str, LoRARequest] = field(default_factory=dict)
    created: Mapping[str, int] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)


class ServedAdapters(dict[str, LoRARequest]):
    """vLLM's own adapters, and those of the store. May be asked from any thread.

    A look at the store costs some microseconds and is taken only for names that begin with ``ft:``
    and for listings; the store is read again only when an adapter was added or removed.

    Args:
        base_models: served names; adapters of other models in the store are not served.
        static: the adapters that vLLM knows already (``--lora-modules``); they, and what vLLM adds
            later, are the items of the dictionary itself.
    """

    def __init__(
        self, store: JobStore, base_models: Collection[str], static: dict[str, LoRARequest]
    ) -> None:
        super().__init__(static)
        self._store = store
        self._base_models = frozenset(base_models)
        self._stored = _Stored()
        self._refreshing = threading.Lock()
        # Adapters of the store that vLLM's own route was told to unload in this process.
        self._unloaded: frozenset[object] = frozenset()

    def created(self, name: str) -> int | None:
        """Unix time at which an adapter of the store was finished."""
        return self._stored.created.get(name)

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None

    def __getitem__(self, name: str) -> LoRARequest:
        # vLLM asks for what it has just found: another process may have deleted it in between, and
        # a KeyError would be the answer 500. So what is known is given without a look at the store.
        found = self._find(name, self._stored)
        if found is None:
            found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def __delitem__(self, name: str) -> None:
        if name in self._stored.loras:
            self._unloaded |= {name}
            self.pop(name, None)
        else:
            super().__delitem__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        """As ``dict.get``."""
        is_ours = isinstance(name, str) and name.startswith(PREFIX)
        found = self._find(name, self._current() if is_ours else self._stored)
        return default if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen())

    def __len__(self) -> int:
        return len(self._seen())

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """As ``dict.keys``, of this moment; so are the two below."""
        return self._seen().keys()

    def values(self) -> ValuesView[LoRARequest]:  # type: ignore[override]
        """As ``dict.values``."""
        return self._seen().values()

    def items(self) -> ItemsView[str, LoRARequest]:  # type: ignore[override]
        """As ``dict.items``."""
        return self._seen().items()

    def _find(self, name: Any, stored: _Stored) -> LoRARequest | None:
        own = super().get(name)
        if own is not None:
            return own
        found = stored.loras.get(name)
        return found if found is not None and self._may_be_seen(name, stored) else None

    def _may_be_seen(self, name: str, stored: _Stored) -> bool:
        """vLLM looks names up within the task of the request, and so does what it starts there."""
        asking = current_organization.get()
        return name not in self._unloaded and (asking is None or stored.owners[name] == asking)

    def _seen(self) -> dict[str, LoRARequest]:
        stored = self._current()
        ours = {n: lora for n, lora in stored.loras.items() if self._may_be_seen(n, stored)}
        return {**dict(list(super().items())), **ours}

    def _current(self) -> _Stored:
        """The adapters of the store as they are now."""
        if self._store.adapters_version() != self._stored.version:
            with self._refreshing:
                version = self._store.adapters_version()
                if version != self._stored.version:
                    self._stored = self._read(version)
        return self._stored

    def _read(self, version: tuple[int, int]) -> _Stored:
        # After the version was: an adapter that comes in between is read twice, none is missed.
        adapters = [a for a in self._store.adapters.all() if a.base_model in self._base_models]
        known = self._stored.loras
        return _Stored(
            version,
            {a.name: known.get(a.name) or _lora_request(a) for a in adapters},
            {a.name: a.created_at for a in adapters},
            {a.name: a.organization_id for a in adapters},
        )


def _lora_request(adapter: ServedAdapter) -> LoRARequest:
    return LoRARequest(
        lora_name=adapter.name,
        lora_int_id=adapter.int_id,
        lora_path=adapter.path,
        base_model_name=adapter.base_model,
    )


def serve_adapters(models: Any, store: JobStore) -> ServedAdapters:
    """Make vLLM's ``OpenAIServingModels`` serve and list the adapters of the store."""
    base_models = [base.name for base in models.base_model_paths]
    adapters = ServedAdapters(store, base_models, models.lora_requests)
    models.lora_requests = adapters
    list_models = models.show_available_models

    async def show_available_models() -> Any:
        # vLLM dates every card to the moment of the request.
        listing = await list_models()
        for card in listing.data:
            created = adapters.created(card.id)
            card.created = created_at(card.root) if created is None else created
        return listing

    models.show_available_models = show_available_models
    return adapters


def created_at(root: str | None) -> int:
    """Unix time of a model that is no adapter of the store: when its folder was written, or for one
    that lies elsewhere, when this process began to serve it."""
    for name in ("config.json", "adapter_config.json"):
        with suppress(OSError):
            return int((Path(root or "") / name).stat().st_mtime)
    return _STARTED
