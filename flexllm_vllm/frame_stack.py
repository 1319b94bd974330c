"""Room for the frames of Python functions, without gaps.

CPython keeps the frames of a thread in chunks of 16 KiB. A call whose frame does not fit any more
maps a new chunk, and its return unmaps it (``_PyThreadState_PopFrame``). So where a function lies
at the end of a chunk, each call that it makes costs two system calls and an interrupt of all
other cores: 35 to 43 us, for each operation of ours in a forward where the caller is the graph
that the compiler has written, whose own frame fills most of a chunk (2 cores of a Zen 3, Python
3.11). Which function that is depends on all frames below it: the same code is slow in one server
and fast in another. Later versions of CPython keep the chunk (gh-142183).
"""

import functools
import threading
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# A chunk is doubled until the frame fits: of 1 MiB this frame takes half, and the rest is room for
# the frames of what it calls. No page of it is touched before it is used.
_SLOTS = (512 << 10) // 8

_thread = threading.local()


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


_call_with_room = types.FunctionType(_call.__code__.replace(co_stacksize=_SLOTS), globals())


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """Has all that ``function`` calls find room for its frames in one chunk.

    Within another such function of the same thread it costs nothing.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if getattr(_thread, "has_room", False):
            return function(*args, **kwargs)
        _thread.has_room = True
        try:
            result: R = _call_with_room(function, args, kwargs)
            return result
        finally:
            _thread.has_room = False

    return call
