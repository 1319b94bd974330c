"""Who may in: a middleware that finds the tenant of a request by its key.

vLLM's own check knows one set of keys, answers in a form of its own and covers four prefixes. Here
every route needs a key as soon as there is a keys file, except those that hold no data; with
``--api-key`` alone vLLM's check stays as it is, and only the 401 of our routes is ours.
"""

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.api.keys import KeyFile
from flexllm_vllm.api.model_not_found import in_openais_form
from flexllm_vllm.api.permissions import check_permission, is_open
from flexllm_vllm.api.prefixes import is_ours, route_path
from flexllm_vllm.api.tenants import LOCAL, Tenant, current_organization


class AccessMiddleware:
    """Puts the tenant into ``request.state.tenant`` and ``current_organization``, or answers 401
    or 403. Bodies and streams pass through untouched.

    Args:
        tokens: the keys of ``--api-key``: the operator, and the organization ``local``.
        keys: the keys of the tenants; None: there are none, and our routes alone are guarded.
    """

    def __init__(
        self, app: ASGIApp, tokens: Sequence[str] = (), keys: KeyFile | None = None
    ) -> None:
        self._app = app
        self._operator = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # OPTIONS: browsers ask it without a key, and CORS answers it.
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
        elif self._keys is None:
            await self._for_one_tenant(scope, receive, send)
        else:
            await self._for_tenants(self._keys, scope, receive, send)

    async def _for_one_tenant(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_ours(scope):
            key = _key(scope)
            if not self._is_operator(key):
                await _unauthorized(key).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _for_tenants(self, keys: KeyFile, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        if is_open(path):
            await self._app(scope, receive, send)
            return
        try:
            tenant = self._authenticate(keys, scope, path)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        token = current_organization.set(tenant.organization_id)
        try:
            await self._app(scope, receive, send if is_ours(scope) else in_openais_form(send))
        finally:
            current_organization.reset(token)

    def _authenticate(self, keys: KeyFile, scope: Scope, path: str) -> Tenant:
        key = _key(scope)
        if self._is_operator(key):
            return LOCAL
        tenant = keys.find(key) if key else None
        if tenant is None:
            raise _unauthorized(key)
        check_permission(tenant, scope.get("method", "GET"), path)
        return tenant

    def _is_operator(self, key: bytes) -> bool:
        digest = hashlib.sha256(key).digest()
        found = False
        for token in self._operator:
            found |= hmac.compare_digest(digest, token)
        return found


def install_access(app: FastAPI, tokens: Sequence[str], keys_file: Path | None) -> None:
    """Guard an application whose middlewares are not built yet, before everything else of it.

    Raises:
        ValueError: the keys file is wrong.
    """
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    if not tokens and keys_file is None:
        return
    keys = KeyFile(keys_file) if keys_file else None
    others = app.user_middleware
    if keys is not None:  # vLLM's check would refuse its keys
        others = [other for other in others if other.cls is not AuthenticationMiddleware]
    own = Middleware(AccessMiddleware, tokens=tokens, keys=keys)
    app.user_middleware = [own, *others]


def _key(scope: Scope) -> bytes:
    """What the request gives as its key; empty if nothing."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _unauthorized(key: bytes) -> ApiError:
    """As OpenAI says it."""
    headers = {"WWW-Authenticate": "Bearer"}
    if key:
        return ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=headers)
    return ApiError(
        401,
        "You didn't provide an API key. You need to provide your API key in an Authorization "
        "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
        headers=headers,
    )
