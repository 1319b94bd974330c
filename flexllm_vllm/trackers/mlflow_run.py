"""MLflow, by its own client, on the server that ``MLFLOW_TRACKING_URI`` names."""

from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from flexllm_vllm.trackers.points import MetricPoint
from flexllm_vllm.trackers.run import RunDescription

# By which a run is found again.
_JOB_TAG = "fine_tuning_job_id"
# Of one request, by MLflow's own rules.
_MAX_METRICS = 1000
_MAX_PARAM_LENGTH = 6000
_STATUSES = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MlflowRun:
    """The run that has the job's id as a tag."""

    def __init__(self, description: RunDescription) -> None:
        self._client = MlflowClient()
        experiment_id = self._experiment(description.settings["experiment_name"])
        query = f"tags.`{_JOB_TAG}` = '{description.job_id}'"
        known = self._client.search_runs([experiment_id], query, max_results=1)
        self._id = known[0].info.run_id if known else self._create(experiment_id, description)
        self.address: str | None = (
            f"{self._id} in the experiment {description.settings['experiment_name']}"
        )

    def _experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # somebody else has, meanwhile
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _create(self, experiment_id: str, description: RunDescription) -> str:
        settings = description.settings
        tags = {**(settings.get("tags") or {}), _JOB_TAG: description.job_id}
        run = self._client.create_run(
            experiment_id, tags=tags, run_name=settings.get("run_name") or description.adapter_name
        )
        params = [
            Param(name, str(value)[:_MAX_PARAM_LENGTH])
            for name, value in description.config.items()
        ]
        self._client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def write(self, points: Sequence[MetricPoint]) -> None:
        metrics = [
            Metric(tag, value, int(point.time * 1000), point.step)
            for point in points
            for tag, value in point.values.items()
        ]
        for first in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MAX_METRICS])

    def finish(self, status: str, fine_tuned_model: str | None) -> None:
        if fine_tuned_model is not None:
            self._client.log_batch(self._id, tags=[RunTag("fine_tuned_model", fine_tuned_model)])
        self._client.set_terminated(self._id, _STATUSES[status])

    def suspend(self) -> None:
        """It stays in MLflow's state RUNNING."""
