"""What this server can reach of experiment trackers: packages, keys, addresses.

Keys come from the server's environment or a file, and go to the process of the tracker's client
alone: never into the store, the log, or an answer.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexllm_vllm.api.child_process import child_environment
from flexllm_vllm.api.errors import invalid
from flexllm_vllm.api.integrations import Integration
from flexllm_vllm.jobs.tracker_types import TrackerKind, TrackerSpec

# W&B's project and MLflow's experiment of jobs that have named none (--finetuning-report-to).
_DEFAULT_PROJECT = "flexllm-vllm"
# MLflow's own defaults keep trying for minutes; the next attempt is ours.
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


@dataclass(frozen=True)
class TrackerAccess:
    """The server's side of trackers.

    Attributes:
        report_to: trackers that every job has, asked for or not.
        wandb_key_file: holds the W&B key; None: it is WANDB_API_KEY.
        environment: the server's.
    """

    report_to: tuple[TrackerKind, ...] = ()
    wandb_key_file: Path | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    def problem(self, kind: TrackerKind) -> str | None:
        """Why a tracker cannot be used on this server; None: it can."""
        spec = importlib.util.find_spec(kind)
        if spec is None or spec.origin is None:  # a folder of this name is no package
            return f"its package is not installed (pip install 'flexllm-vllm[{kind}]')"
        if kind == "mlflow" and not self.environment.get("MLFLOW_TRACKING_URI"):
            return "MLFLOW_TRACKING_URI is not set in the server's environment"
        if kind == "wandb" and not self._has_wandb_key:
            return (
                "the server has no key for it (WANDB_API_KEY or --finetuning-wandb-key-file), and "
                "WANDB_MODE is not 'offline'"
            )
        return None

    def check(self) -> None:
        """To be called when the server starts.

        Raises:
            ValueError: a flag asks for what cannot be.
        """
        if self.wandb_key_file is not None:
            try:
                empty = not self.wandb_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"--finetuning-wandb-key-file {self.wandb_key_file} cannot be read: {error}"
                ) from None
            if empty:
                raise ValueError(f"--finetuning-wandb-key-file {self.wandb_key_file} is empty")
        for kind in self.report_to:
            if problem := self.problem(kind):
                raise ValueError(f"--finetuning-report-to {kind}: {problem}")

    def trackers(self, integrations: Sequence[Integration] | None) -> tuple[TrackerSpec, ...]:
        """Those of a new job.

        Raises:
            ApiError: one that it asks for is not to be had.
        """
        specs = [TrackerSpec("tensorboard")]
        for index, integration in enumerate(integrations or ()):
            param = f"integrations[{index}]"
            kind = integration.type
            if any(spec.kind == kind for spec in specs):
                raise invalid(f"'{kind}' is there twice", param)
            if problem := self.problem(kind):
                raise invalid(f"'{kind}' cannot be used: {problem}", param)
            specs.append(TrackerSpec(kind, integration.settings))
        named = {spec.kind for spec in specs}
        specs += [TrackerSpec(k, self._defaults(k)) for k in self.report_to if k not in named]
        return tuple(specs)

    def process_environment(self, kind: TrackerKind) -> dict[str, str]:
        """Of the process in which the tracker's client runs.

        Raises:
            OSError: the key file cannot be read.
        """
        environment = child_environment(self.environment)
        if kind == "wandb" and self.wandb_key_file is not None:
            environment["WANDB_API_KEY"] = self.wandb_key_file.read_text().strip()
        return {**_MLFLOW_PATIENCE, **environment} if kind == "mlflow" else environment

    @property
    def _has_wandb_key(self) -> bool:
        offline = self.environment.get("WANDB_MODE") in ("offline", "disabled")
        key = self.wandb_key_file is not None or self.environment.get("WANDB_API_KEY")
        return bool(offline or key)

    def _defaults(self, kind: TrackerKind) -> dict[str, str]:
        if kind == "wandb":
            return {"project": self.environment.get("WANDB_PROJECT") or _DEFAULT_PROJECT}
        experiment = self.environment.get("MLFLOW_EXPERIMENT_NAME") or _DEFAULT_PROJECT
        return {"experiment_name": experiment}
