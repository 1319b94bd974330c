"""What is installed beside the Python files."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("folder", "package"),
    [("flexllm_vllm/web", "flexllm_vllm"), ("kernels/cpu", "flexllm_vllm.kernels")],
)
def test_files_that_are_no_modules_are_declared(folder: str, package: str) -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    root = ROOT / setuptools["package-dir"][package]
    declared = {path for glob in setuptools["package-data"][package] for path in root.glob(glob)}
    files = set((ROOT / folder).iterdir())
    assert files
    assert files <= declared
