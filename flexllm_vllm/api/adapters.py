"""Trained adapters among the models that vLLM serves.

vLLM finds an adapter by name in ``OpenAIServingModels.lora_requests``, a dictionary of one API
process. Here that dictionary follows the store, so that every API process serves a finished adapter
at once, under the integer id that the store has issued. On a server with tenants it holds, for the
task of a request, the adapters of the request's organization only.
"""

import time
from collections.abc import Collection, ItemsView, Iterator, KeysView, ValuesView
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from flexllm_vllm.api.tenants import current_organization
from flexllm_vllm.jobs.store import JobStore

PREFIX = "ft:"
_STARTED = int(time.time())


class ServedAdapters(dict[str, LoRARequest]):
    """vLLM's own adapters, and those of the store.

    A look at the store costs some microseconds and is taken only for names that begin with ``ft:``
    and for listings; the store is read again only when an adapter was added or removed.

    Args:
        base_models: served names; adapters of other models in the store are not served.
        static: the adapters that vLLM knows already (``--lora-modules``).
    """

    def __init__(
        self, store: JobStore, base_models: Collection[str], static: dict[str, LoRARequest]
    ) -> None:
        super().__init__(static)
        self._store = store
        self._base_models = frozenset(base_models)
        self._version: tuple[int, int] | None = None
        self._created: dict[str, int] = {}
        self._owners: dict[object, str] = {}

    def created(self, name: str) -> int | None:
        """Unix time at which an adapter of the store was finished."""
        return self._created.get(name)

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and name.startswith(PREFIX):
            self._refresh()
        return super().__contains__(name) and self._may_be_seen(name)

    def __getitem__(self, name: str) -> LoRARequest:
        if name not in self:
            raise KeyError(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As ``dict.get``."""
        try:
            return self[name]
        except KeyError:
            return default

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

    def _may_be_seen(self, name: object) -> bool:
        """vLLM looks names up within the task of the request, and so does what it starts there."""
        asking = current_organization.get()
        return asking is None or self._owners.get(name, asking) == asking

    def _seen(self) -> dict[str, LoRARequest]:
        self._refresh()
        return {name: lora for name, lora in super().items() if self._may_be_seen(name)}

    def _refresh(self) -> None:
        version = self._store.adapters_version()
        if version == self._version:
            return
        adapters = {
            adapter.name: adapter
            for adapter in self._store.adapters.all()
            if adapter.base_model in self._base_models
        }
        for name in self._created.keys() - adapters.keys():
            self.pop(name, None)
        for name, adapter in adapters.items():
            if name not in self._created:
                # An owner first: another thread may look the name up.
                self._owners[name] = adapter.organization_id
                self[name] = LoRARequest(
                    lora_name=name,
                    lora_int_id=adapter.int_id,
                    lora_path=adapter.path,
                    base_model_name=adapter.base_model,
                )
        self._created = {name: adapter.created_at for name, adapter in adapters.items()}
        self._owners = {name: adapter.organization_id for name, adapter in adapters.items()}
        self._version = version


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
