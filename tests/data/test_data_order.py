from itertools import chain

import pytest

from flexllm_vllm.data.order import batches, num_steps


def test_every_epoch_visits_each_example_once_in_its_own_order() -> None:
    steps = list(batches(10, 4, n_epochs=2, seed=3))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_order_is_a_function_of_the_seed() -> None:
    assert list(batches(50, 8, 3, seed=1)) == list(batches(50, 8, 3, seed=1))
    assert list(batches(50, 8, 3, seed=1)) != list(batches(50, 8, 3, seed=2))


def test_without_shuffle_the_order_is_that_of_the_file() -> None:
    assert list(batches(3, 2, 2, shuffle=False)) == [[0, 1], [2], [0, 1], [2]]


@pytest.mark.parametrize("max_steps", [-1, 2, 9])
def test_max_steps_takes_the_place_of_epochs(max_steps: int) -> None:
    steps = list(batches(10, 4, n_epochs=2, max_steps=max_steps))
    assert len(steps) == num_steps(10, 4, 2, max_steps) == (6 if max_steps == -1 else max_steps)


def test_nonsense_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        batches(10, 4, 1, max_steps=0)
    with pytest.raises(ValueError, match="positive"):
        num_steps(0, 4, 1)
