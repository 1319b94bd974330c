"""What training takes of the device's memory, beside the activation cache."""

from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.kernels.cross_entropy import CHUNK
from flexllm_vllm.models.base import ModelBackward
from flexllm_vllm.plan import TrainAdapter
from flexllm_vllm.worker.flat_layout import FlatLayout

# Buffers of an adapter: weights, gradients of the batch and of the pack, AdamW's two moments.
ADAPTER_BUFFERS = 5
# Of a checkpoint that is being copied: weights and moments.
SNAPSHOT_BUFFERS = 3
# Tensors as wide as the widest projection that a backward window holds at once (the projection, its
# gradient, SwiGLU's product and its gradient, and one that is being made).
WINDOW_BUFFERS = 5
# All of them are float32, or narrower.
ITEM_BYTES = 4


def training_bytes(model: ModelBackward, config: FinetuningConfig, num_tokens: int) -> int:
    """Bytes that training takes at most, to be left free by vLLM's KV cache.

    For as many jobs as train at once, with the largest rank on all linear layers; vLLM's LoRA slots
    and the frozen weights are not in it.

    Args:
        model: whose adapters are trained.
        config: with its limits.
        num_tokens: that the activation cache holds.
    """
    layout = FlatLayout(_largest_adapter(model, config), model)
    # Over several ranks a checkpoint's parts are gathered one after the other.
    whole = layout.whole_size
    snapshot = SNAPSHOT_BUFFERS * whole if model.parallel.size == 1 else 2 * whole
    adapters = config.max_jobs * (ADAPTER_BUFFERS * layout.size) + snapshot
    # The gradients of the residual stream, and of K and V, of packs that run backward.
    packs = num_tokens * (model.hidden_size + 2 * model.num_kv_heads * model.head_size)
    window = WINDOW_BUFFERS * max(config.max_tokens, CHUNK) * model.widest
    logits = 2 * CHUNK * model.vocab_size
    return ITEM_BYTES * (adapters + packs + window + logits)


def _largest_adapter(model: ModelBackward, config: FinetuningConfig) -> TrainAdapter:
    targets = tuple(target for group in model.lora_groups.values() for target in group)
    return TrainAdapter(
        job_id="", lora_int_id=0, r=config.max_lora_rank, lora_alpha=1.0, use_rslora=False,
        target_modules=targets, seed=0, init_path=None, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.0,
    )  # fmt: skip
