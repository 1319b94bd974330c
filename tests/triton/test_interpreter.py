"""Runs the tests of ``interpreted/`` in a process that has Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("file", sorted(x.name for x in FOLDER.glob("test_*.py")))
def test_the_kernels_are_right_in_tritons_interpreter(file: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
