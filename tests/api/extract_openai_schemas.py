"""Takes what concerns this server out of OpenAI's published OpenAPI description.

    git clone https://github.com/openai/openai-openapi
    cd tests/api
    python extract_openai_schemas.py ../../openai-openapi f85dbe2 > openai_schemas.json

The extract says which commit it is of, and carries the licence (MIT).
"""

import json
import subprocess
import sys
from typing import Any

PATHS = ("/files", "/fine_tuning/jobs", "/fine_tuning/checkpoints", "/models", "/uploads")
# Components that no answer of these paths leads to.
OTHERS = (
    "ErrorResponse",
    "WebhookFineTuningJobCancelled",
    "WebhookFineTuningJobFailed",
    "WebhookFineTuningJobSucceeded",
)


def extract(description: dict[str, Any]) -> dict[str, Any]:
    """``{"responses": {path: {method: schema}}, "components": {"schemas": ...}}``."""
    schemas = description["components"]["schemas"]
    responses: dict[str, dict[str, Any]] = {}
    for path, operations in description["paths"].items():
        if not path.startswith(PATHS):
            continue
        for method, operation in operations.items():
            content = operation.get("responses", {}).get("200", {}).get("content", {})
            if schema := content.get("application/json", {}).get("schema"):
                responses.setdefault(path, {})[method] = _bare(schema)
    wanted: dict[str, Any] = {}
    found = [*_references(responses), *OTHERS]
    while found:
        name = found.pop()
        if name not in wanted:
            wanted[name] = _bare(schemas[name])
            found += _references(wanted[name])
    return {"responses": responses, "components": {"schemas": dict(sorted(wanted.items()))}}


def _references(node: Any) -> list[str]:
    """Names of the components that a schema refers to."""
    if isinstance(node, dict):
        own = [node["$ref"].rpartition("/")[2]] if isinstance(node.get("$ref"), str) else []
        return own + [name for value in node.values() for name in _references(value)]
    if isinstance(node, list):
        return [name for value in node for name in _references(value)]
    return []


def _bare(node: Any) -> Any:
    """A schema without what validates nothing, in JSON Schema's present form."""
    if isinstance(node, dict):
        left_out = ("description", "example", "examples", "title", "deprecated")
        if node.get("exclusiveMinimum") is True:  # a form of OpenAPI 3.0
            node = {**node, "exclusiveMinimum": node["minimum"]}
        return {
            key: _bare(value)
            for key, value in node.items()
            if not key.startswith("x-") and not (key in left_out and not isinstance(value, dict))
        }
    return [_bare(value) for value in node] if isinstance(node, list) else node


def _show(repository: str, object_name: str) -> str:
    """A file, or a commit's id, of a clone."""
    done = subprocess.run(
        ["git", "-C", repository, *object_name.split()], check=True, capture_output=True, text=True
    )
    return done.stdout


if __name__ == "__main__":
    clone, commit = sys.argv[1:]
    source = {
        "repository": "https://github.com/openai/openai-openapi",
        "commit": _show(clone, f"rev-parse {commit}").strip(),
        "file": "openapi.json",
        "licence": _show(clone, f"show {commit}:LICENSE"),
    }
    description = json.loads(_show(clone, f"show {commit}:openapi.json"))
    json.dump({"source": source, **extract(description)}, sys.stdout, indent=1)
    print()
