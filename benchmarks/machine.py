"""What a report says of the machine it was taken on."""

import datetime
import os
import platform
import time
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """Processor, cores, instruction set, versions, date."""
    import vllm

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "processor": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "date": datetime.date.today().isoformat(),
    }


def gemm_gflops(dtype: torch.dtype = torch.float32, size: int = 2048) -> dict[str, float]:
    """Speed of a square matrix product, by torch's BLAS and by oneDNN: the ceiling here and now."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))

    def best(run: object) -> float:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            run()  # type: ignore[operator]
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds) / 1e9

    onednn = torch.ops.mkldnn._linear_pointwise
    return {
        "torch": best(lambda: a @ b),
        "onednn": best(lambda: onednn(a, b.t(), None, "none", [], "")),
    }


def memory_mib(pid: int, field: str) -> float:
    """``VmHWM`` (the peak) or ``VmRSS`` of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def reset_peak(pid: int) -> None:
    """Lets ``VmHWM`` start again from the present."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
