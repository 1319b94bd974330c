"""Which examples make which optimizer step: a function of the numbers alone, so that a run can be
repeated and continued."""

from collections.abc import Iterator
from itertools import count, islice

import numpy as np


def batches(
    num_examples: int,
    batch_size: int,
    n_epochs: int,
    max_steps: int = -1,
    seed: int = 0,
    shuffle: bool = True,
) -> Iterator[list[int]]:
    """Yield the example indices of each optimizer step.

    Every epoch visits each example once, in an order drawn from ``PCG64(seed, epoch)`` if
    ``shuffle``, else in the order of the file; its last batch may be smaller. ``max_steps``, where
    positive, takes the place of ``n_epochs`` as in ``transformers.TrainingArguments``: epochs
    follow each other until it is reached.
    """
    _check(num_examples, batch_size, n_epochs, max_steps)
    return islice(
        _endless(num_examples, batch_size, seed, shuffle),
        num_steps(num_examples, batch_size, n_epochs, max_steps),
    )


def num_steps(num_examples: int, batch_size: int, n_epochs: int, max_steps: int = -1) -> int:
    """Number of optimizer steps that :func:`batches` yields."""
    _check(num_examples, batch_size, n_epochs, max_steps)
    if max_steps > 0:
        return max_steps
    return n_epochs * -(-num_examples // batch_size)


def _endless(num_examples: int, batch_size: int, seed: int, shuffle: bool) -> Iterator[list[int]]:
    for epoch in count():
        order = np.arange(num_examples)
        if shuffle:
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples)
        for start in range(0, num_examples, batch_size):
            yield order[start : start + batch_size].tolist()


def _check(num_examples: int, batch_size: int, n_epochs: int, max_steps: int) -> None:
    if num_examples < 1 or batch_size < 1 or n_epochs < 1:
        raise ValueError(
            f"num_examples, batch_size and n_epochs must be positive, got {num_examples}, "
            f"{batch_size}, {n_epochs}"
        )
    if max_steps != -1 and max_steps < 1:
        raise ValueError(f"max_steps must be -1 (none) or positive, got {max_steps}")
