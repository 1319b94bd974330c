"""Tokenized examples, flat, in one safetensors file."""

import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

FILE_NAME = "dataset.safetensors"


class TokenizedDataset:
    """Examples as token ids and loss masks.

    Args:
        input_ids: int32 ``[num_tokens]``, all examples one after another.
        loss_mask: uint8 ``[num_tokens]``; 1 where the token is a target, like a label other than
            -100 in ``transformers``. The first token of an example never is.
        offsets: int64 ``[num_examples + 1]``; example ``i`` is ``[offsets[i], offsets[i + 1])``.
    """

    def __init__(
        self,
        input_ids: NDArray[np.int32],
        loss_mask: NDArray[np.uint8],
        offsets: NDArray[np.int64],
    ) -> None:
        if input_ids.shape != loss_mask.shape or input_ids.ndim != 1 or offsets.ndim != 1:
            raise ValueError(
                f"expected input_ids and loss_mask of one shape [num_tokens], got "
                f"{input_ids.shape} and {loss_mask.shape}, offsets {offsets.shape}"
            )
        if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != input_ids.size:
            raise ValueError(f"offsets must run from 0 to num_tokens = {input_ids.size}")
        if np.any(np.diff(offsets) <= 0):
            raise ValueError("offsets must increase: an example has at least one token")
        self.input_ids = input_ids
        self.loss_mask = loss_mask
        self.offsets = offsets

    def __len__(self) -> int:
        return int(self.offsets.size) - 1

    def num_tokens(self, index: int) -> int:
        """Number of tokens of one example."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def num_loss_tokens(self, index: int) -> int:
        """Number of tokens of one example that are targets."""
        return int(self.loss_mask[self._range(index)].sum())

    def example(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and loss mask of one example, both ``[num_tokens(index)]``."""
        where = self._range(index)
        return self.input_ids[where].tolist(), self.loss_mask[where].tolist()

    def _range(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def save(self, path: Path) -> None:
        """Write to a file, or into a folder as ``dataset.safetensors``. All or nothing."""
        path = _file_in(path)
        partial = path.with_name(path.name + ".partial")
        tensors: dict[str, NDArray[Any]] = {
            "input_ids": self.input_ids,
            "loss_mask": self.loss_mask,
            "offsets": self.offsets,
        }
        save_file(tensors, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "TokenizedDataset":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is not a tokenized dataset.
        """
        path = _file_in(path)
        tensors = load_file(path)
        expected = {"input_ids": np.int32, "loss_mask": np.uint8, "offsets": np.int64}
        for name, dtype in expected.items():
            if name not in tensors or tensors[name].dtype != dtype:
                raise ValueError(f"{path.name} has no tensor '{name}' of type {np.dtype(dtype)}")
        return cls(tensors["input_ids"], tensors["loss_mask"], tensors["offsets"])


class DatasetBuilder:
    """Collects examples in four and one bytes a token, not in Python lists."""

    def __init__(self) -> None:
        self._input_ids = array("i")
        self._loss_mask = array("B")
        self._offsets = array("q", [0])

    def add(self, input_ids: list[int], loss_mask: list[int]) -> None:
        """Append one example."""
        self._input_ids.extend(input_ids)
        self._loss_mask.extend(loss_mask)
        self._offsets.append(len(self._input_ids))

    def build(self) -> TokenizedDataset:
        """The dataset of all examples added so far."""
        return TokenizedDataset(
            np.array(self._input_ids, dtype=np.int32),
            np.array(self._loss_mask, dtype=np.uint8),
            np.array(self._offsets, dtype=np.int64),
        )


def _file_in(path: Path) -> Path:
    return path / FILE_NAME if path.is_dir() else path
