"""Calls map no memory, however deep they are."""

import resource
import threading

import pytest

from flexllm_vllm.frame_stack import with_room

CALLS = 300
DEPTHS = 300


def _leaf() -> None:
    pass


def _page_faults_of_calls(depth: int, most: list[int]) -> None:
    """At each depth the page faults of some calls; the largest number is kept."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(CALLS):
        _leaf()
    most[0] = max(most[0], resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    if depth:
        _page_faults_of_calls(depth - 1, most)


def _in_thread(function) -> int:
    """Of a thread of its own, whose frames begin at the same place in every run."""
    most = [0]
    thread = threading.Thread(target=function, args=(DEPTHS, most))
    thread.start()
    thread.join()
    return most[0]


def test_no_call_maps_memory_with_room() -> None:
    if _in_thread(_page_faults_of_calls) < CALLS:
        pytest.skip("this Python keeps the chunks of its frames")
    assert _in_thread(with_room(_page_faults_of_calls)) < CALLS / 10


def test_arguments_results_and_errors_pass() -> None:
    @with_room
    def divide(a: int, *, b: int) -> float:
        """Of a by b."""
        return a / b

    assert divide(1, b=2) == 0.5
    with pytest.raises(ZeroDivisionError):
        divide(1, b=0)
    assert divide(1, b=2) == 0.5
    assert divide.__doc__ == "Of a by b."


def test_it_may_be_nested() -> None:
    @with_room
    def count(n: int) -> int:
        return count(n - 1) + 1 if n else 0

    assert count(50) == 50
