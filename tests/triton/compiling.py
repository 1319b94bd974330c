"""Compiles a Triton kernel for a GPU that is not there, as the launch on one would."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, compile


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread, bytes of shared memory of a block, and the bytes
    of a thread that ptxas had to move from registers to memory."""

    registers: int
    shared_bytes: int
    spilled_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.shared_bytes} bytes of shared memory, "
            f"{self.spilled_bytes} bytes spilled"
        )


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, dtype: str,
    **options: int,
) -> Resources:  # fmt: skip
    """Compiles down to the GPU's own code; any lowering error is raised.

    Pointers, and integers that the kernel lets Triton specialise, are taken as multiples of 16,
    which is what a launch finds on a real model: it decides on the width of loads, and so on
    registers and shared memory.

    Args:
        kernel: decorated by ``triton.jit``.
        types: of arguments that are no ``i32``, by name: ``"*i64"``, ``"fp32"``; ``"*x"`` stands
            for a pointer to ``dtype``.
        constants: values of the ``tl.constexpr`` arguments.
        capability: 80 for sm_80, 90 for sm_90.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        options: of the launch (``num_warps``, ``num_stages``).
    """
    signature, attributes = {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = types.get(name, "i32").replace("*x", f"*{dtype}")
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and not parameter.do_not_specialize):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if not compiled.asm["cubin"]:
        raise ValueError(f"{kernel.__name__} compiled to nothing for sm_{capability}")
    return _resources(compiled)


def _resources(compiled: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target sm_(\d+a?)", compiled.asm["ptx"])
        assert target is not None
        done = subprocess.run(
            [get_ptxas(int(target.group(1)[:2])).path, "-v", f"--gpu-name=sm_{target.group(1)}",
             str(ptx), "-o", str(ptx.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers is not None
    return Resources(
        registers=int(registers.group(1)),
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=int(spilled.group(1)) if spilled else 0,
    )
