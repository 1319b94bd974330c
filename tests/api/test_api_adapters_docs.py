"""The examples of docs/adapters.md, as they stand there."""

import re
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft_adapters import logits, save_random_adapter

TEXT = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def blocks(language: str) -> str:
    return "".join(re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL))


def test_the_commands_do_what_they_say(
    server: Any, client: openai.OpenAI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_random_adapter(tmp_path / "my-adapter", 1, target_modules=["q_proj"])
    other = save_random_adapter(
        server.store.adapters_folder / "other", 2, target_modules=["q_proj"]
    )
    server.store.adapters.add("ft:demo:local::other", other, "demo", "import")
    environment = {"SERVER": server.url, "KEY": "none", "OTHER": "ft:demo:local::other"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks("bash")],
        cwd=tmp_path,
        env={**environment, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(logits(tmp_path / "exported"), logits(source))
    assert '"status":"queued"' in done.stdout

    code = blocks("python").replace("client.models.delete(name)", "")
    found: dict[str, Any] = {"client": client, "name": "ft:demo:local::other"}
    exec(code, found)
    assert found["model"].id == "ft:demo:local::other"
    assert "ft:demo:local::other" in capsys.readouterr().out


def test_the_routes_are_described(server: Any) -> None:
    listed = set(re.findall(r"`(?:[A-Z/]+) (/v1/[^`]*)`", TEXT))
    described = set(server.app.openapi()["paths"])
    assert listed <= described
    assert len(listed) == 6
    for path in listed:
        for operation in server.app.openapi()["paths"][path].values():
            assert {"200", "4XX", "5XX"} == set(operation["responses"])
            assert operation["description"]
