"""vLLM's scheduler, stock or ours, for an engine that does not exist."""

import copy
import functools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from flexllm_vllm.config import KEY, FinetuningConfig

AnyScheduler = TypeVar("AnyScheduler", bound=Scheduler)

VOCAB_SIZE = 32_000
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class EngineSpec:
    """What a scheduler is told of its engine. The defaults: a 70B model on 8 GPUs of 40 GB.

    Attributes:
        num_layers: decoder layers.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: tokens of an iteration.
        num_blocks: KV blocks, vLLM's null block included.
        block_size: tokens of a KV block.
        prefix_caching: whether requests share blocks of equal prefixes.
        finetuning: the plugin's flags.
    """

    num_layers: int = 80
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    num_blocks: int = 20_000
    block_size: int = 16
    prefix_caching: bool = False
    finetuning: FinetuningConfig = field(
        default_factory=lambda: FinetuningConfig(max_jobs=8, max_tokens=1024)
    )


def make_scheduler(cls: type[AnyScheduler], spec: EngineSpec, **kwargs: Any) -> AnyScheduler:
    """A scheduler of this class, as vLLM's engine core would construct it.

    Args:
        cls: the class.
        spec: of its engine.
        kwargs: further arguments of the class.
    """
    config = copy.copy(_vllm_config(spec.num_layers))
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = spec.max_num_seqs
    config.scheduler_config.max_num_batched_tokens = spec.max_num_batched_tokens
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.block_size = spec.block_size
    config.cache_config.num_gpu_blocks = spec.num_blocks
    config.cache_config.enable_prefix_caching = spec.prefix_caching
    config.additional_config = {KEY: spec.finetuning.to_dict()}
    attention = FullAttentionSpec(
        block_size=spec.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    return cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=spec.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=spec.block_size,
        **kwargs,
    )


@functools.cache
def _vllm_config(num_layers: int) -> VllmConfig:
    """Llama-2-70B's shape with so many layers; only its ``config.json`` is ever read."""
    with tempfile.TemporaryDirectory(prefix="simulate-") as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps(
                {
                    "architectures": ["LlamaForCausalLM"],
                    "model_type": "llama",
                    "hidden_size": 8192,
                    "intermediate_size": 28672,
                    "num_hidden_layers": num_layers,
                    "num_attention_heads": 64,
                    "num_key_value_heads": 8,
                    "vocab_size": VOCAB_SIZE,
                    "max_position_embeddings": MAX_MODEL_LEN,
                    "dtype": "bfloat16",
                }
            )
        )
        return VllmConfig(
            model_config=ModelConfig(
                model=folder,
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=MAX_MODEL_LEN,
            ),
            cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
            scheduler_config=SchedulerConfig(
                max_num_seqs=256,
                max_num_batched_tokens=2048,
                max_model_len=MAX_MODEL_LEN,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
                async_scheduling=False,
            ),
            lora_config=LoRAConfig(max_loras=4, max_lora_rank=16),
        )
