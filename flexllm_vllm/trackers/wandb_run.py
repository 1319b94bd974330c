"""Weights & Biases, by its own client: https://docs.wandb.ai/ref/python/."""

from collections.abc import Sequence

import wandb

from flexllm_vllm.trackers.points import MetricPoint
from flexllm_vllm.trackers.run import RunDescription

# Nothing of the server: no code, no git, no console, no machine, no list of packages.
_SETTINGS = wandb.Settings(
    console="off",
    silent=True,
    init_timeout=60,
    disable_code=True,
    disable_git=True,
    disable_job_creation=True,
    x_disable_machine_info=True,
    x_disable_meta=True,
    x_disable_stats=True,
    x_save_requirements=False,
)


class WandbRun:
    """The run whose id is the job's. W&B itself drops steps that it has already."""

    def __init__(self, description: RunDescription) -> None:
        settings = description.settings
        self._run = wandb.init(
            project=settings["project"],
            entity=settings.get("entity"),
            name=settings.get("name") or description.adapter_name,
            tags=settings.get("tags"),
            id=description.job_id,
            resume="allow",
            config=description.config,
            dir=description.folder,
            settings=_SETTINGS,
        )
        self.address: str | None = self._run.url

    def write(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            self._run.log(point.values, step=point.step)

    def finish(self, status: str, fine_tuned_model: str | None) -> None:
        self._run.summary["status"] = status
        if fine_tuned_model is not None:
            self._run.summary["fine_tuned_model"] = fine_tuned_model
        self._run.finish(exit_code=0 if status == "succeeded" else 1)

    def suspend(self) -> None:
        self._run.mark_preempting()
        self._run.finish(exit_code=1)
