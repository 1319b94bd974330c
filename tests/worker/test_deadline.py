"""Backward windows that are run until a deadline, on a clock of the test's own."""

import random

import pytest

from flexllm_vllm.plan import BackwardWindow, OptionalWindow
from flexllm_vllm.worker.deadline import OptionalRunner

ROWS = 512


class Machine:
    """Takes ``fixed`` and ``row`` milliseconds, times its speed, and remembers what it has run."""

    def __init__(self, fixed: float = 3.0, row: float = 0.1, noise: float = 0.0) -> None:
        self.fixed, self.row, self.noise = fixed, row, noise
        self.factor = 1.0
        self.now = 100.0
        self.ran: list[BackwardWindow] = []
        self.fails = False
        self.rng = random.Random(0)

    def run(self, window: BackwardWindow) -> bool:
        if self.fails:
            return False
        self.ran.append(window)
        ms = self.fixed + self.row * window.num_token_layers
        self.now += 1e-3 * self.factor * ms * self.rng.lognormvariate(0, self.noise)
        return True


def offer(layers: int = 4, row_ms: float = 0.1, fixed_ms: float = 3.0) -> list[OptionalWindow]:
    return [
        OptionalWindow(BackwardWindow(1, layer, 0, ROWS, layer), fixed_ms, row_ms, 16)
        for layer in range(layers - 1, -1, -1)
    ]


def make(machine: Machine) -> OptionalRunner:
    return OptionalRunner(lambda: machine.now)


def test_all_is_run_where_there_is_time() -> None:
    machine = Machine()
    done, took_ms = make(machine).run(offer(), machine.now + 1.0, machine.run)
    assert done == machine.ran == [x.window for x in offer()]
    assert took_ms == pytest.approx(4 * (3.0 + 51.2))


def test_nothing_is_run_after_the_deadline() -> None:
    machine = Machine()
    assert make(machine).run(offer(), machine.now - 0.01, machine.run) == ([], 0.0)
    assert make(machine).run(offer(), machine.now + 0.004, machine.run) == ([], 0.0)


@pytest.mark.parametrize("left_ms", [8.0, 20.0, 37.0, 48.0, 80.0, 150.0])
def test_the_last_window_is_cut_to_the_time_that_is_left(left_ms: float) -> None:
    machine = Machine()
    began = machine.now
    done, took_ms = make(machine).run(offer(), machine.now + left_ms / 1e3, machine.run)
    assert left_ms - 6.0 < took_ms <= left_ms + 1e-6
    assert took_ms == pytest.approx(1e3 * (machine.now - began))
    # Rows from the last on, each once, and of no layer before the one above it is through.
    expected = [(layer, row) for layer in (3, 2, 1, 0) for row in range(ROWS - 1, -1, -1)]
    rows = [(w.layer, row) for w in done for row in range(w.end - 1, w.start - 1, -1)]
    assert rows == expected[: len(rows)]
    assert all(w.lowest == w.layer and w.end - w.start >= 16 for w in done)


def test_a_slower_machine_is_learnt_and_the_end_is_kept() -> None:
    machine = Machine(noise=0.1)
    machine.factor = 1.6
    runner = make(machine)
    late = []
    for _ in range(300):
        deadline = machine.now + 0.05
        runner.run(offer(), deadline, machine.run)
        late.append(1e3 * (machine.now - deadline))
    assert runner.pace[False] == pytest.approx(1.6, rel=0.2)
    assert runner.pace[True] == 1.0
    # A part of the time is left to the last window alone: its noise is most of what is late.
    late = late[50:]
    assert max(late) < 8.0
    assert sum(ms > 2.5 for ms in late) < 0.1 * len(late)
    assert sum(late) / len(late) > -6.0


def test_of_the_loss_head_the_rows_are_cut_that_cost_something_and_once() -> None:
    window = OptionalWindow(BackwardWindow(1, 4, 100, 400, 4, num_costly=60), 3.0, 1.0, 4)
    machine = Machine(row=1.0)
    runner = make(machine)
    done, took_ms = runner.run([window, *offer()], machine.now + 0.025, machine.run)
    assert [(w.start, w.num_costly) for w in done] == [(380, 20)]
    assert took_ms == pytest.approx(3.0 + 20.0)
    done, _ = runner.run([window], machine.now + 0.2, machine.run)
    assert done == [window.window]


@pytest.mark.parametrize("left_ms", [12.0, 23.0, 31.0, 47.0])
def test_windows_are_cut_at_multiples_of_the_least(left_ms: float) -> None:
    machine = Machine()
    rows = 509
    window = OptionalWindow(BackwardWindow(1, 3, 0, rows, 3), 3.0, 0.1, 16)
    done, _ = make(machine).run([window], machine.now + left_ms / 1e3, machine.run)
    assert done
    assert all(w.start % 16 == 0 for w in done)


def test_where_a_pack_ends_rows_are_preferred_that_have_run_before() -> None:
    machine = Machine()
    runner = make(machine)

    def first_of(rows: int, left_ms: float) -> int:
        window = OptionalWindow(BackwardWindow(1, 3, 0, rows, 3), 3.0, 0.1, 16)
        done, _ = runner.run([window], machine.now + left_ms / 1e3, machine.run)
        return done[0].end - done[0].start

    # 253 is 13 + 15 * 16, and so are all that are cut off a pack of as many rows.
    assert first_of(413, 41.0) == 253
    assert first_of(413, 44.0) == 253  # in place of 269
    assert first_of(413, 56.0) == 349  # 253 is too few
    # Multiples of 16 occur anyway.
    assert first_of(416, 41.0) == 256
    assert first_of(416, 44.0) == 272


def test_what_was_not_run_is_not_reported() -> None:
    machine = Machine()
    machine.fails = True
    assert make(machine).run(offer(), machine.now + 1.0, machine.run) == ([], 0.0)
