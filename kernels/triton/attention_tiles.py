"""How the attention kernels are cut into tiles, and launched."""

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, and how it is run."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def width(head_size: int) -> int:
    """Elements of a row of a tile: a power of two, and 16 at least for tensor cores."""
    return max(16, triton.next_power_of_2(head_size))


# Tiles that spill no register on sm_80 and sm_90 (``tests/triton/test_compilation.py``); in float32
# with heads beyond 64, which few will train in, dK and dV spill a little.
def forward_tile(head_size: int, dtype: torch.dtype) -> Tile:
    """The tile of the forward."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 2)
    return Tile(64, 64, 4 if width(head_size) <= 64 else 8, 2)


def dq_tile(head_size: int, dtype: torch.dtype) -> Tile:
    """The tile of ``dQ``."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1) if width(head_size) <= 64 else Tile(16, 32, 4, 1)
    return Tile(64, 64, 4 if width(head_size) <= 64 else 8, 2)


def dkv_tile(head_size: int, dtype: torch.dtype) -> Tile:
    """The tile of ``dK`` and ``dV``."""
    return Tile(32, 32, 8, 1) if dtype == torch.float32 else Tile(64, 64, 8, 2)


def launch(tile: Tile) -> dict[str, int]:
    """The tile as arguments of a kernel's launch."""
    return {
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
