from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexllm_vllm.data.dataset import DatasetBuilder, TokenizedDataset


def test_the_file_holds_flat_tensors(tmp_path: Path) -> None:
    builder = DatasetBuilder()
    builder.add([5, 6, 7], [0, 0, 1])
    builder.add([8, 9], [0, 1])
    builder.build().save(tmp_path)
    tensors = load_file(tmp_path / "dataset.safetensors")
    assert tensors["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert tensors["loss_mask"].tolist() == [0, 0, 1, 0, 1]
    assert tensors["offsets"].tolist() == [0, 3, 5]
    dataset = TokenizedDataset.load(tmp_path)
    assert len(dataset) == 2
    assert dataset.example(1) == ([8, 9], [0, 1])
    with pytest.raises(IndexError):
        dataset.example(2)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"input_ids": np.zeros(3, np.int64)}, path)
    with pytest.raises(ValueError, match="input_ids"):
        TokenizedDataset.load(path)
