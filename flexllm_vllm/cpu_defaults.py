"""Defaults for a server on a CPU, where vLLM's own are slow for training.

They are set through the environment because vLLM reads them there, when it starts the worker
process; what the user has set is left alone.
"""

import os
import sys
from pathlib import Path

import torch

from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

# vLLM's automatic binding keeps a core for the API process. Of two cores that is half the machine:
# a decode step takes 93 ms then, and 43 ms with both. Of many it does not matter.
FEW_CORES = 8


def default_dtype() -> str | None:
    """``"float32"`` on a processor without native bfloat16, where its GEMM is 400x slower."""
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if capable or torch.backends.cpu.get_cpu_capability() in ("SVE256", "SVE128"):
        return None
    logger.info("dtype: float32, since this processor has no native bfloat16")
    return "float32"


def apply_cpu_defaults(num_workers: int = 1) -> None:
    """Binds all of a few cores to the workers, and preloads Intel's OpenMP where it is installed.

    Args:
        num_workers: among which the cores are divided.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // num_workers
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ and len(cores) < FEW_CORES and each:
        parts = [cores[i * each : (i + 1) * each] for i in range(num_workers)]
        binding = "|".join(",".join(map(str, part)) for part in parts)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = binding
        logger.info("VLLM_CPU_OMP_THREADS_BIND: all cores, %s", binding)
    iomp = Path(sys.prefix) / "lib" / "libiomp5.so"
    preload = os.environ.get("LD_PRELOAD", "")
    # vLLM takes one OpenMP runtime, not two: a libgomp that is preloaded already stays.
    if iomp.exists() and "libiomp" not in preload and "libgomp" not in preload:
        os.environ["LD_PRELOAD"] = ":".join(filter(None, (preload, str(iomp))))
        logger.info("LD_PRELOAD: %s", iomp)
