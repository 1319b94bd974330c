"""How the decoder layers of the supported model families run backward."""

from flexllm_vllm.models.base import ModelBackward, RowSegment
from flexllm_vllm.models.registry import build_backward

__all__ = ["ModelBackward", "RowSegment", "build_backward"]
