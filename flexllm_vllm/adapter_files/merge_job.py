"""What the merging program is told; apart from it, since it imports torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeJob:
    """A merge, by the folders of its adapters; see :class:`flexllm_vllm.jobs.types.MergeSpec`.

    Attributes:
        modules: paths of all linears of the base model, in its order.
        num_layers: its decoder layers.
        result: the folder to write, which exists and is empty.
    """

    paths: list[str]
    weights: list[float]
    method: str
    density: float | None
    svd_rank: int | None
    majority_sign_method: str
    seed: int
    modules: list[str]
    num_layers: int
    result: str

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "MergeJob":
        """What :meth:`write` has written."""
        return cls(**json.loads(path.read_text()))
