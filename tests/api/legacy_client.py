"""Calls with ``openai==0.28``, the last client that knew ``/v1/fine_tunes``; run by its own Python.

``legacy_client.py BASE_URL CALL [ARGUMENT]`` prints what the client returns as JSON.
"""

import json
import sys
from typing import Any

import openai


def _call(name: str, argument: str) -> Any:
    if name == "upload":
        with open(argument, "rb") as file:
            return openai.File.create(file=file, purpose="fine-tune")
    if name == "create":
        return openai.FineTune.create(training_file=argument, n_epochs=2, suffix="old")
    if name == "create job":  # this client knew the newer routes too
        return openai.FineTuningJob.create(training_file=argument, model="demo")
    if name == "error":
        try:
            openai.FineTune.retrieve(argument)
        except openai.error.InvalidRequestError as error:
            return {"status": error.http_status, "code": error.code, "message": error.user_message}
    calls = {
        "list": lambda: openai.FineTune.list(),
        "retrieve": lambda: openai.FineTune.retrieve(argument),
        "cancel": lambda: openai.FineTune.cancel(argument),
        "events": lambda: openai.FineTune.list_events(argument),
        "follow": lambda: list(openai.FineTune.stream_events(argument)),
        "list jobs": lambda: openai.FineTuningJob.list(limit=2),
        "job events": lambda: openai.FineTuningJob.list_events(argument, limit=1),
        "delete model": lambda: openai.Model.delete(argument),
    }
    return calls[name]()


if __name__ == "__main__":
    openai.api_base, openai.api_key = sys.argv[1], "none"
    json.dump(_call(*[*sys.argv[2:], ""][:2]), sys.stdout)
