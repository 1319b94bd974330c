"""Answers against OpenAI's published description (``openai_schemas.json``)."""

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

_Schema = dict[str, Any]


def _pauses(schemas: _Schema) -> None:
    """``pause`` answers with a state of its own, which ``FineTuningJob`` does not list."""
    schemas["FineTuningJob"]["properties"]["status"]["enum"].append("paused")


def _takes_more(schemas: _Schema) -> None:
    """Epochs and batches that OpenAI has no machines for; ``beta`` likewise."""
    job = schemas["FineTuningJob"]["properties"]["hyperparameters"]["properties"]
    methods = ("FineTuneSupervisedHyperparameters", "FineTuneDPOHyperparameters")
    for properties in (job, *(schemas[method]["properties"] for method in methods)):
        for name in {"n_epochs", "batch_size", "beta"} & set(properties):
            _without_maximum(properties[name])


def _without_maximum(schema: Any) -> None:
    if isinstance(schema, dict):
        schema.pop("maximum", None)
        for value in schema.values():
            _without_maximum(value)
    elif isinstance(schema, list):
        for value in schema:
            _without_maximum(value)


def _has_mlflow(schemas: _Schema) -> None:
    """A second kind of ``integrations``."""
    mlflow = {
        "type": "object",
        "required": ["type", "mlflow"],
        "properties": {"type": {"enum": ["mlflow"]}, "mlflow": {"type": "object"}},
    }
    schemas["FineTuningIntegration"] = {"oneOf": [schemas["FineTuningIntegration"], mlflow]}


# How this server differs, and nothing else; docs/migrate-from-openai.md tells of each.
DIFFERENCES = {"status": _pauses, "hyperparameters": _takes_more, "integrations": _has_mlflow}


@functools.cache
def _published() -> _Schema:
    found: _Schema = json.loads((Path(__file__).parent / "openai_schemas.json").read_text())
    return found


@functools.cache
def _components(differences: frozenset[str]) -> _Schema:
    components: _Schema = copy.deepcopy(_published()["components"])
    for name in differences:
        DIFFERENCES[name](components["schemas"])
    return components


@functools.cache
def _operations() -> list[tuple[re.Pattern[str], _Schema]]:
    """Patterns of paths, the fixed ones first."""
    responses = _published()["responses"]
    return [
        (re.compile("/v1" + re.sub(r"\{[^}]*\}", "[^/]+", path) + "/?"), methods)
        for path, methods in sorted(responses.items(), key=lambda item: "{" in item[0])
    ]


def operations() -> set[tuple[str, str]]:
    """Method and path of every operation that is described."""
    responses = _published()["responses"].items()
    return {(method, path) for path, methods in responses for method in methods}


def schema_of(response: httpx.Response) -> _Schema | None:
    """What OpenAI says of the answer to this request; None where it has no such operation."""
    if response.status_code >= 400:
        return {"$ref": "#/components/schemas/ErrorResponse"}
    path = response.request.url.raw_path.decode().partition("?")[0]
    for pattern, methods in _operations():
        if pattern.fullmatch(path):
            return methods.get(response.request.method.lower())
    return None


def faults(
    body: Any, schema: _Schema | str, differences: frozenset[str] = frozenset(DIFFERENCES)
) -> list[str]:
    """Where a body is not as described.

    Args:
        body: decoded JSON.
        schema: or the name of a component.
        differences: those of :data:`DIFFERENCES` that are allowed.
    """
    if isinstance(schema, str):
        schema = {"$ref": f"#/components/schemas/{schema}"}
    whole = {**schema, "components": _components(differences)}
    found = jsonschema.Draft202012Validator(whole).iter_errors(body)
    return [f"{error.json_path}: {error.message}" for error in found]


def check(response: httpx.Response) -> None:
    """An event hook of httpx: whatever a test asks, the answer is one that OpenAI could give."""
    schema = schema_of(response)
    if schema is None or "json" not in response.headers.get("content-type", ""):
        return
    response.read()
    if found := faults(response.json(), schema):
        # Unlike an AssertionError, the client passes this on.
        pytest.fail(f"{response.request.method} {response.request.url}: " + "; ".join(found))
