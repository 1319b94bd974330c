"""Imports run one way."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "flexllm_vllm"

# Folder -> the parts of the package that it may import.
MAY_IMPORT = {
    "kernels": {"kernels", "log"},
    "kernels/triton": {"kernels"},
    "patches": {"patches", "kernels", "api", "flags", "frame_stack"},
    "flexllm_vllm/data": {"data", "log"},
    "flexllm_vllm/jobs": {"jobs", "data", "log"},
    "flexllm_vllm/adapter_files": {"adapter_files", "log"},
    "flexllm_vllm/trackers": {"trackers", "log"},
    "flexllm_vllm/api": {
        "api",
        "jobs",
        "data",
        "adapter_files",
        "trackers",
        "checkpoints",
        "config",
        "log",
    },
    "flexllm_vllm/commandline": {"commandline", "__version__"},
    "flexllm_vllm/models": {"models", "kernels", "architectures"},
    "flexllm_vllm/worker": {
        "worker",
        "models",
        "kernels",
        "patches",
        "plan",
        "checkpoints",
        "config",
        "frame_stack",
        "log",
    },
    "flexllm_vllm/scheduler": {
        "scheduler",
        "jobs",
        "data",
        "patches",
        "plan",
        "checkpoints",
        "config",
        "log",
    },
}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, by full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_part_imports_only_what_lies_below_it(folder: str) -> None:
    files = list((ROOT / folder).glob("*.py"))
    assert files
    for path in files:
        parts = {name.split(".")[1] for name in imported(path) if name.startswith(f"{PACKAGE}.")}
        assert parts <= MAY_IMPORT[folder], path


def test_kernels_know_only_torch() -> None:
    optional = {"xformers_attention.py": {"xformers"}}
    for path in (ROOT / "kernels").glob("*.py"):
        foreign = {n.split(".")[0] for n in imported(path)} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", PACKAGE} | optional.get(path.name, set()), path


def test_kernels_and_patches_are_no_top_level_modules() -> None:
    import flexllm_vllm.kernels
    import flexllm_vllm.patches

    assert flexllm_vllm.kernels.__name__ == "flexllm_vllm.kernels"
    assert flexllm_vllm.patches.__name__ == "flexllm_vllm.patches"
