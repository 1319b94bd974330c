import sys
from pathlib import Path

import pytest

from examples.tenants import make_keys
from flexllm_vllm.api.keys import KeyFile


def test_the_server_knows_the_keys_and_the_file_does_not_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    monkeypatch.setattr(sys, "argv", ["make_keys", str(path), "acme", "globex"])
    make_keys.main()
    printed = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    keys = KeyFile(path)
    for organization, key in printed.items():
        tenant = keys.find(key.encode())
        assert tenant is not None
        assert tenant.organization_id == organization
        assert key not in path.read_text()
    assert list(tmp_path.iterdir()) == [path]
