"""Where the metrics of a job go."""

from dataclasses import dataclass, field
from typing import Any, Literal

TrackerKind = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True)
class TrackerSpec:
    """Where the metrics of a job shall go. ``settings`` are those of the tracker's ``integrations``
    entry; none of them is a secret."""

    kind: TrackerKind
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobTracker:
    """A tracker of a job, claimed by a process.

    Attributes:
        position: number of the last event that it has.
        attempt: counted from 1, since it was last seen to work.
        claim: by which the process that holds it is known.
    """

    seq: int
    job_id: str
    kind: TrackerKind
    settings: dict[str, Any]
    position: int
    attempt: int
    claim: str
