from pathlib import Path

import pytest

from flexllm_vllm import checkpoints
from flexllm_vllm.checkpoints import CheckpointError


def make(folder: Path, step: int) -> Path:
    """A whole checkpoint, as the worker leaves it and the engine names it."""
    path = checkpoints.folder_of(folder, step)
    written = checkpoints.unfinished(path)
    written.mkdir(parents=True)
    for name in (*checkpoints.ADAPTER_FILES, checkpoints.OPTIMIZER_FILE):
        (written / name).write_bytes(f"{name} of {step}".encode())
    checkpoints.write_state(written, {"step": step})
    assert checkpoints.newest(folder)[0] is None or not path.exists()
    checkpoints.finish(path)
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) == (None, [])
    for step in (9, 100, 20):
        make(tmp_path, step)
    found, problems = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.path.name, found.state, problems) == ("step-100", {"step": 100}, [])


@pytest.mark.parametrize("name", [
    *checkpoints.ADAPTER_FILES, checkpoints.OPTIMIZER_FILE, checkpoints.STATE_FILE,
])  # fmt: skip
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, name: str, damage: str
) -> None:
    make(tmp_path, 1)
    file = make(tmp_path, 2) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        changed = bytes([content[0] ^ 1]) + content[1:]
        file.write_bytes(changed if damage == "changed" else content[:-1])
    found, problems = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.state == {"step": 1}
    # Without its state it is no checkpoint, but an adapter that is served.
    assert len(problems) == (name != checkpoints.STATE_FILE or damage != "gone")
    if problems:
        with pytest.raises(CheckpointError, match="step-2"):
            checkpoints.read(file.parent)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    kept = make(tmp_path, 3)
    for name in ("step-4.new", "step-4.new.tmp"):
        (tmp_path / name).mkdir()
    checkpoints.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_served_checkpoints_keep_their_adapter_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    checkpoints.strip(tmp_path, keep={3}, adapters={1})
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-3"}
    assert {path.name for path in (tmp_path / "step-1").iterdir()} == set(checkpoints.ADAPTER_FILES)
    assert checkpoints.resumable_steps(tmp_path) == [3]
