"""TensorBoard event files, written synchronously: what was written is on the file when it returns.

``SummaryWriter`` hands events to a thread of its own, which cannot say that a disk is full.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from flexllm_vllm.trackers.points import MetricPoint


class TensorBoardFiles:
    """The event files of a job, of which each writer begins a new one.

    Its first point says where it goes on: readers drop what older files have from that step on.

    Args:
        folder: of the job's event files, created when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: EventsWriter | None = None

    def write(self, points: Sequence[MetricPoint]) -> None:
        """Append points, in the order of their steps.

        Raises:
            OSError: the disk is full, or broken.
        """
        if not points:
            return
        if self._file is None:
            self._file = self._begin(points[0])
        for point in points:
            values = [
                Summary.Value(tag=tag, simple_value=value) for tag, value in point.values.items()
            ]
            self._file.write_event(
                Event(wall_time=point.time, step=point.step, summary=Summary(value=values))
            )
        self._file.flush()

    def _begin(self, first: MetricPoint) -> EventsWriter:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        # Files are read in the order of their names, which have the time in seconds and then this.
        file = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        file.write_event(Event(wall_time=first.time, step=first.step, session_log=start))
        return file

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
