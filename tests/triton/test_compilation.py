"""Every kernel compiles for the GPUs that vLLM is used on, which takes no GPU.

``-s`` prints what ptxas makes of each: registers, shared memory, spills.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, compile

from flexllm_vllm.kernels.triton import (
    adamw,
    capture,
    cross_entropy,
    paged_attention,
    rms_norm,
    rotary,
    segmented_lora,
    swiglu,
)

# dtype of activations -> what each argument is; "x" stands for a pointer to activations.
LORA = {"ROWS": segmented_lora.ROWS, "COLUMNS": segmented_lora.COLUMNS, "RANK": 16}
ATTENTION = {"QUERIES": paged_attention.QUERIES, "KEYS": paged_attention.KEYS, "WIDTH": 128}
ATTENTION_TYPES = (
    dict.fromkeys(("query", "d_out", "cache"), "*x")
    | dict.fromkeys(("row_norm", "row_delta", "dq", "dk", "dv"), "*fp32")
    | {"blocks": "*i64", "scale": "fp32", "soft_cap": "fp32"}
)
CASES: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
    ("rms_norm", rms_norm.rms_norm_kernel, {"x": "*x", "weight": "*x", "y": "*x", "eps": "fp32"},
     {"BLOCK": 4096}),
    ("rms_norm_backward", rms_norm.rms_norm_backward_kernel,
     {"dy": "*x", "x": "*x", "weight": "*x", "residual": "*fp32", "dx": "*fp32", "eps": "fp32"},
     {"BLOCK": 4096, "HAS_RESIDUAL": True}),
    ("swiglu", swiglu.swiglu_kernel, {"gate_up": "*x", "out": "*x"}, {"BLOCK": swiglu.BLOCK}),
    ("swiglu_backward", swiglu.swiglu_backward_kernel,
     {"dy": "*x", "gate_up": "*x", "gradient": "*x", "product": "*x"}, {"BLOCK": swiglu.BLOCK}),
    ("rotary", rotary.rotary_kernel,
     {"x": "*x", "cos_sin": "*fp32", "out": "*x", "sign": "fp32"}, {"NEOX": True, "BLOCK": 64}),
    ("cross_entropy", cross_entropy.cross_entropy_kernel,
     {"logits": "*x", "targets": "*i64", "losses": "*fp64", "correct": "*i64",
      "logit_scale": "fp32", "scale": "fp32"},
     {"WITH_GRADIENT": True, "BLOCK": cross_entropy.BLOCK}),
    ("adamw", adamw.adamw_kernel,
     dict.fromkeys(("weights", "gradients", "exp_avg", "exp_avg_sq", "norm"), "*fp32")
     | dict.fromkeys(("learning_rate", "beta1", "beta2", "eps", "weight_decay", "correction1",
                      "correction2", "max_norm"), "fp32"), {"BLOCK": adamw.BLOCK}),
    ("capture", capture.capture_kernel,
     {"x": "*x", "addend": "*x", "slots": "*i64", "pool": "*x"},
     {"HAS_ADDEND": True, "BLOCK": capture.BLOCK}),
    ("lora_shrink", segmented_lora.shrink_kernel,
     {"x": "*x", "matrix": "*fp32", "out": "*x", "scaling": "*fp32", "starts": "*i32",
      "slots": "*i32"}, LORA),
    ("lora_outer", segmented_lora.outer_kernel,
     {"left": "*x", "right": "*x", "gradient": "*fp32", "starts": "*i32", "slots": "*i32"}, LORA),
    ("lora_expand", segmented_lora.expand_kernel,
     {"g": "*x", "a": "*fp32", "dx": "*fp32", "starts": "*i32", "slots": "*i32"}, LORA),
    ("attention_forward", paged_attention.dq_kernel, ATTENTION_TYPES | {"dq": "*x"},
     {**ATTENTION, "FORWARD": True, "WINDOWED": True, "CAPPED": True}),
    ("attention_dq", paged_attention.dq_kernel, ATTENTION_TYPES,
     {**ATTENTION, "FORWARD": False, "WINDOWED": True, "CAPPED": True}),
    ("attention_dkv", paged_attention.dkv_kernel, ATTENTION_TYPES,
     {**ATTENTION, "WINDOWED": True, "CAPPED": True}),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (80, "fp32"), (90, "bf16")])
@pytest.mark.parametrize(("name", "kernel", "types", "constants"), CASES, ids=[c[0] for c in CASES])
def test_compiles(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int,
    dtype: str,
) -> None:  # fmt: skip
    signature = {
        argument: "constexpr" if argument in constants
        else types.get(argument, "i32").replace("*x", f"*{dtype}")
        for argument in kernel.arg_names
    }  # fmt: skip
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": paged_attention.num_warps(128)} if "QUERIES" in constants else {}
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    print(f"\n{name} sm_{capability} {dtype}: {_resources(compiled)}")


def _resources(compiled: Any) -> str:
    """Registers and spills of a thread, shared memory of a block, by ptxas."""
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
    return (
        f"{registers.group(1)} registers, {compiled.metadata.shared} bytes of shared memory, "
        f"{spilled.group(1) if spilled else 0} bytes spilled"
    )
