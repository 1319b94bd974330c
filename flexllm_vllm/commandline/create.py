"""``flexllm jobs create``."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from flexllm_vllm.commandline.arguments import auto_or_int, pairs
from flexllm_vllm.commandline.errors import CommandError
from flexllm_vllm.commandline.follow import follow_progress
from flexllm_vllm.commandline.job_request import MethodOptions
from flexllm_vllm.commandline.jobs import Follow, app, show_job
from flexllm_vllm.commandline.session import Session, server_command
from flexllm_vllm.commandline.uploads import uploaded_id


class Method(StrEnum):
    """What a job learns from."""

    SUPERVISED = "supervised"
    DPO = "dpo"


TrainingFile = Annotated[
    str,
    typer.Argument(metavar="TRAIN", help="A JSONL file to upload, or the id of one (file-...)."),
]
Model = Annotated[
    str | None, typer.Option(help="What to finetune.", show_default="the server's base model")
]
ValidationFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="A JSONL file to upload, or the id of one.")
]
Suffix = Annotated[str | None, typer.Option(help="Part of the trained model's name.")]
Seed = Annotated[int | None, typer.Option(help="Of the order of examples and the first weights.")]
Epochs = Annotated[
    Any, typer.Option("--n-epochs", metavar="N|auto", parser=auto_or_int, help="Times over TRAIN.")
]
BatchSize = Annotated[
    Any, typer.Option(metavar="N|auto", parser=auto_or_int, help="Examples in a step.")
]
LearningRate = Annotated[float | None, typer.Option(help="The highest learning rate.")]
LoraR = Annotated[int | None, typer.Option(help="Rank of the adapter.")]
LoraAlpha = Annotated[
    float | None, typer.Option(help="Scale of the adapter, before it is divided by r.")
]
MethodName = Annotated[Method, typer.Option(help="What the examples are.")]
Beta = Annotated[float | None, typer.Option(help="With dpo: how close to stay to the model.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other hyperparameter, or lora.NAME of the adapter; the value is JSON or text.",
    ),
]
Metadata = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="A pair to keep with the job.")
]
WandbProject = Annotated[
    str | None, typer.Option(metavar="NAME", help="Send its metrics to this project of W&B.")
]
MlflowExperiment = Annotated[
    str | None, typer.Option(metavar="NAME", help="Send its metrics to this experiment of MLflow.")
]


@server_command(app, "create")
def create(
    session: Session,
    train: TrainingFile,
    model: Model = None,
    validation_file: ValidationFile = None,
    suffix: Suffix = None,
    seed: Seed = None,
    n_epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    lora_r: LoraR = None,
    lora_alpha: LoraAlpha = None,
    method: MethodName = Method.SUPERVISED,
    beta: Beta = None,
    settings: Settings = None,
    metadata: Metadata = None,
    wandb_project: WandbProject = None,
    mlflow_experiment: MlflowExperiment = None,
    follow: Follow = False,
) -> None:
    """Upload TRAIN and start a job on it; with --follow show its progress until it ends."""
    options = MethodOptions(
        type=method.value,
        hyperparameters={
            "n_epochs": n_epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "beta": beta,
        },
        lora={"r": lora_r, "lora_alpha": lora_alpha},
        settings=pairs(settings, "--set"),
    )
    request: dict[str, Any] = {"method": options.to_request()}
    if metadata:
        request["metadata"] = pairs(metadata, "--metadata")
    integrations: list[dict[str, Any]] = []
    if wandb_project is not None:
        integrations.append({"type": "wandb", "wandb": {"project": wandb_project}})
    if mlflow_experiment is not None:
        mlflow = {"experiment_name": mlflow_experiment}
        integrations.append({"type": "mlflow", "mlflow": mlflow})
    if integrations:
        request["integrations"] = integrations
    if suffix is not None:
        request["suffix"] = suffix
    if seed is not None:
        request["seed"] = seed
    request["model"] = model or _base_model(session)
    request["training_file"] = uploaded_id(session, train, "TRAIN")
    if validation_file is not None:
        request["validation_file"] = uploaded_id(session, validation_file, "--validation-file")
    job = session.client.fine_tuning.jobs.create(**request)
    if not follow:
        show_job(session, job)
        return
    session.output.note(f"Created {job.id}")
    follow_progress(session, job)


def _base_model(session: Session) -> str:
    """The first model that is no adapter.

    Raises:
        CommandError: the server names none.
    """
    for model in session.client.models.list():
        if getattr(model, "parent", None) is None and not model.id.startswith("ft:"):
            return model.id
    raise CommandError("The server lists no base model; name one with --model", param="model")
