"""Memory that is freed is taken again without the operating system."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from flexllm_vllm.worker.heap import keep_freed_memory
    assert keep_freed_memory()

def run():
    # 40 MB: of more than 32 glibc takes none from its heap, unless it is told to.
    torch.full((10_000_000,), 1.0)

for _ in range(40):
    run()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_is_freed_is_taken_again_without_page_faults() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 1000 < faults("returned")
