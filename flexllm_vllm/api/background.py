"""Work that an API process does beside its requests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

from fastapi import FastAPI


class _Runs(Protocol):
    def running(self) -> AbstractAsyncContextManager[None]: ...


def while_serving(name: str) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The ``lifespan`` of a router: enters ``running()`` of what ``app.state`` has under a name,
    if anything. The state is complete when the life of the application begins."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work: _Runs | None = getattr(app.state, name, None)
        if work is None:
            yield
            return
        async with work.running():
            yield

    return lifespan


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do ``work`` as long as the context lasts; when it ends, the work has been cancelled and has
    cleaned up."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
