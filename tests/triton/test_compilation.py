"""Every kernel compiles for the GPUs that vLLM is used on, which takes no GPU.

``-s`` prints what ptxas makes of each: registers, shared memory, spills.
"""

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from compiling import compile_kernel

from flexllm_vllm.kernels.triton import (
    adamw,
    attention_tiles,
    capture,
    cross_entropy,
    geglu,
    paged_attention,
    rms_norm,
    rotary,
    segmented_lora,
    swiglu,
)

# dtype of activations -> what each argument is; "x" stands for a pointer to activations.
LORA = {"ROWS": segmented_lora.ROWS, "COLUMNS": segmented_lora.COLUMNS, "RANK": 16}
GEGLU = {"SLOPE": geglu.SLOPE, "CUBIC": geglu.CUBIC, "BLOCK": geglu.BLOCK}
ATTENTION_TYPES = (
    dict.fromkeys(("query", "d_out", "cache"), "*x")
    | dict.fromkeys(("row_norm", "row_delta", "dq", "dk", "dv"), "*fp32")
    | {"out": "*x", "blocks": "*i64", "scale": "fp32", "soft_cap": "fp32"}
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
    ("geglu", geglu.geglu_kernel, {"gate_up": "*x", "out": "*x"}, GEGLU),
    ("geglu_backward", geglu.geglu_backward_kernel,
     {"dy": "*x", "gate_up": "*x", "gradient": "*x", "product": "*x"}, GEGLU),
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
]  # fmt: skip


TARGETS = [(80, "bf16"), (80, "fp32"), (90, "bf16")]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(("name", "kernel", "types", "constants"), CASES, ids=[c[0] for c in CASES])
def test_compiles(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int,
    dtype: str,
) -> None:  # fmt: skip
    resources = compile_kernel(kernel, types, constants, capability, dtype)
    print(f"\n{name} sm_{capability} {dtype}: {resources}")


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("name", ["forward", "dq", "dkv"])
def test_attention_compiles_and_keeps_its_tiles_in_registers(
    name: str, capability: int, dtype: str, head_size: int
) -> None:
    kernel = getattr(paged_attention, f"{name}_kernel")
    tile = getattr(attention_tiles, f"{name}_tile")(
        head_size, torch.float32 if dtype == "fp32" else torch.bfloat16
    )
    constants = {"HEADS": 32, "GROUP": 4, "HEAD_SIZE": head_size, "BLOCK_SIZE": 16,
                 "WINDOWED": True, "CAPPED": True, "QUERIES": tile.queries, "KEYS": tile.keys,
                 "WIDTH": head_size}  # fmt: skip
    resources = compile_kernel(
        kernel, ATTENTION_TYPES, constants, capability, dtype,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    print(f"\n{name} {head_size} sm_{capability} {dtype}: {resources}")
    if dtype == "bf16" or head_size == 64:
        assert resources.spilled_bytes == 0
