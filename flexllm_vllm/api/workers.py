"""Threads for work that takes long and is all Python, such as checking a file line by line.

They are few, since each takes turns with the event loop that serves requests, and they are apart
from the threads of short work, which would wait behind it.
"""

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

_THREADS = ThreadPoolExecutor(2, thread_name_prefix="finetuning-files")

P = ParamSpec("P")
R = TypeVar("R")


async def run_long(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """``asyncio.to_thread`` in one of these threads."""
    call: Callable[[], Any] = functools.partial(
        contextvars.copy_context().run, functools.partial(function, *args, **kwargs)
    )
    return await asyncio.get_running_loop().run_in_executor(_THREADS, call)
