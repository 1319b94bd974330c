"""The CPU kernels in ``kernels/cpu``: compiled on first use, called through ctypes.

They are plain C++ without any of torch's headers, so that the compiler needs two seconds and not a
minute. Where no compiler is found the torch implementations beside each operation do the work.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch

from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

SOURCES = Path(__file__).parent / "cpu"
# No -ffast-math: NaN and infinity must arrive at the checks of loss and gradient norm.
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
    "-std=c++17",
    "-shared",
    "-fPIC",
)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_SIGNATURES: dict[str, list[Any]] = {
    "rms_norm": [c_int, c_void_p, c_void_p, c_long, c_long, c_float, c_void_p],
    "add_rms_norm": [c_int, c_void_p, c_void_p, c_void_p, c_long, c_long, c_float],
    "rms_norm_backward": [c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_float,
                          c_void_p],
    "swiglu": [c_int, c_void_p, c_long, c_long, c_void_p],
    "swiglu_backward": [c_int, c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p],
    "rotary": [c_int, c_int, c_void_p, c_long, c_long, c_void_p, c_float, c_long, c_long, c_long,
               c_long, c_int, c_void_p, c_long, c_long],
    "cross_entropy": [c_int, c_void_p, c_void_p, c_long, c_long, c_float, c_float, c_void_p,
                      c_void_p],
    "attention_backward": [c_int, c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p, c_long,
                           c_long, c_long, c_long, c_long, c_long, c_float, c_void_p, c_void_p,
                           c_long, c_void_p],
    "attention_forward": [c_int, c_void_p, c_void_p, c_long, c_long, c_void_p, c_long, c_long,
                          c_long, c_long, c_long, c_long, c_float, c_void_p],
    "few_rows": [c_int, c_void_p, c_long, c_long, c_void_p, c_long, c_long, c_long, c_void_p,
                 c_void_p, c_long],
    "keep_rows": [c_int, c_void_p, c_long, c_void_p, c_long, c_long, c_long, c_void_p, c_long,
                  c_void_p, c_long, c_long, c_long],
    "lora_add": [c_int, c_void_p, c_long, c_void_p, c_long, c_long, c_long, c_void_p, c_long,
                 c_long, c_float],
    "lora_backward": [c_int, c_void_p, c_long, c_void_p, c_long, c_void_p, c_long, c_void_p, c_int,
                      c_long, c_long, c_void_p, c_long, c_long, c_float],
}  # fmt: skip


def cache_dir() -> Path:
    """Where the compiled library is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flexllm-vllm" / "kernels"


def compiler() -> str | None:
    """``$CXX``, or the first C++ compiler on the path."""
    candidates = filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++"))
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _flags() -> tuple[str, ...]:
    """GCC uses half of AVX-512's registers unless told otherwise."""
    return (*FLAGS, "-mprefer-vector-width=512") if b"avx512f" in _processor() else FLAGS


def _processor() -> bytes:
    """What ``-march=native`` depends on: a home folder may be shared by different machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return b""
    lines = {line for line in text.splitlines() if line.startswith(("model name", "flags"))}
    return "\n".join(sorted(lines)).encode()


def build(folder: Path) -> Path:
    """Compiles the library unless this very one is there; several processes may do so at once.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found (g++, clang++ or $CXX)")
    sources = sorted(SOURCES.glob("*.cpp"))
    digest = hashlib.sha256(repr((cxx, _flags())).encode() + _processor())
    for path in (*sorted(SOURCES.glob("*.h")), *sources):
        digest.update(path.read_bytes())
    library = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / library.name
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        command = [cxx, *_flags(), *map(str, sources), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        built.replace(library)
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be built, which is logged once."""
    try:
        loaded = ctypes.CDLL(str(build(cache_dir())))
    except (OSError, RuntimeError) as error:
        logger.warning("finetuning runs on torch operations, which are slower: %s", error)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, f"finetuning_{name}")
        function.argtypes, function.restype = arguments, None
    return loaded


def lanes() -> int:
    """Floats of a vector register; head sizes must be a multiple of it."""
    found = library()
    return int(found.finetuning_lanes()) if found is not None else 1


def function(name: str) -> Any:
    """A kernel itself, which takes addresses in place of tensors; None where there is none.

    For those who call it so often that the checks of :func:`call` show, with checks of their own.
    """
    found = library()
    return None if found is None else getattr(found, f"finetuning_{name}")


def call(name: str, *arguments: Any) -> bool:
    """Runs a kernel; False where it cannot, and the caller uses torch.

    Args:
        name: without its prefix.
        arguments: as the kernel takes them, tensors in place of pointers. The dtype of the first
            one, a tensor, selects the kernel.
    """
    return call_typed(name, arguments[0], *arguments)


def call_typed(name: str, typed_by: torch.Tensor, *arguments: Any) -> bool:
    """Like :func:`call`, the dtype taken from ``typed_by``."""
    kernel = function(name)
    dtype = _DTYPES.get(typed_by.dtype)
    if kernel is None or dtype is None or typed_by.device.type != "cpu":
        return False
    kernel(dtype, *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))
    return True
