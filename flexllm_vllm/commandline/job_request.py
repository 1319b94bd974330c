"""From the options of ``jobs create`` to the body of the request."""

from dataclasses import dataclass
from typing import Any

import typer

from flexllm_vllm.commandline.arguments import json_or_text

_LORA = "lora."


@dataclass(frozen=True)
class MethodOptions:
    """How to train. None: the server's default.

    Attributes:
        hyperparameters, lora: by the names of the API.
        settings: ``--set``, as typed; ``lora.<name>`` is a setting of the adapter.
    """

    type: str
    hyperparameters: dict[str, Any]
    lora: dict[str, Any]
    settings: dict[str, str]

    def to_request(self) -> dict[str, Any]:
        """The request's ``method``.

        Raises:
            typer.BadParameter: a value that is given twice or belongs to another method.
        """
        hyperparameters = _given(self.hyperparameters)
        lora = _given(self.lora)
        for name, text in self.settings.items():
            target = lora if name.startswith(_LORA) else hyperparameters
            key = name.removeprefix(_LORA)
            if key in target:
                option = "--" + (f"lora-{key}" if key == "r" else key).replace("_", "-")
                raise typer.BadParameter(f"{name} is given by {option} too", param_hint="--set")
            target[key] = json_or_text(text)
        if "beta" in hyperparameters and self.type != "dpo":
            raise typer.BadParameter("is of --method dpo only", param_hint="--beta")
        settings: dict[str, Any] = {"hyperparameters": hyperparameters}
        if lora:
            settings["lora"] = lora
        return {"type": self.type, self.type: settings}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
