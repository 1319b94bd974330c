from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flexllm_vllm.trackers.points import MetricPoint, metric_point
from flexllm_vllm.trackers.tensorboard import TensorBoardFiles


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard itself reads them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_new_writer_replaces_what_lies_from_its_first_step_on(tmp_path: Path) -> None:
    def points(first: int, last: int, value: float) -> list[MetricPoint]:
        return [MetricPoint(i, 100.0 + i, {"train/loss": value}) for i in range(first, last + 1)]

    crashed = TensorBoardFiles(tmp_path)
    crashed.write(points(1, 5, 1.0))
    later = TensorBoardFiles(tmp_path)  # in the same second
    later.write(points(4, 6, 2.0))
    later.close()
    values = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert scalars(tmp_path, "train/loss") == values
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_created_for_nothing(tmp_path: Path) -> None:
    files = TensorBoardFiles(tmp_path / "tensorboard")
    files.write([])
    files.close()
    assert list(tmp_path.iterdir()) == []


def test_metrics_have_tags_and_those_that_are_no_numbers_are_left_out() -> None:
    data = {
        "step": 3,
        "total_steps": 9,
        "train_loss": None,
        "train_mean_token_accuracy": 0.5,
        "rewards/margins": float("inf"),
        "grad_norm": 2,
        "valid_loss": 1.5,
    }
    values = {"train/token_accuracy": 0.5, "train/grad_norm": 2.0, "valid/loss": 1.5}
    assert metric_point(data, 7) == MetricPoint(3, 7, values)
