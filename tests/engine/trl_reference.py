"""DPO as TRL's own trainer does it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from reference import lora_tensors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class TrlBatch:
    """One batch of ``trl.DPOTrainer``.

    Attributes:
        loss: of the batch.
        gradients: ``"<module path>.A"``/``".B"`` -> gradient.
        examples: token ids and loss masks; first the preferred ones, then the others.
        rewards: mean reward of either, as it is logged.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    examples: list[tuple[list[int], list[int]]]
    rewards: dict[str, float]


def dpo_batch(
    model: Path,
    adapter: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[Messages, Messages, Messages]],
    beta: float,
    folder: Path,
) -> TrlBatch:
    """Loss and gradients of an adapter on one batch, against the base model as reference.

    Args:
        pairs: prompt, chosen and rejected messages.
        folder: for what the trainer writes.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder),
            beta=beta,
            per_device_train_batch_size=len(pairs),
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
        ),
        processing_class=tokenizer,
        peft_config=config,
    )
    # A fresh adapter, so that TRL's reference is the base model; then with these weights.
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(adapter), device="cpu"))
    trainer.model.double()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    rows = zip(
        inputs["input_ids"], inputs["completion_mask"], inputs["attention_mask"], strict=True
    )
    return TrlBatch(
        loss=float(loss.detach()),
        gradients=lora_tensors(trainer.model, "grad"),
        examples=[(ids[a == 1].tolist(), mask[a == 1].tolist()) for ids, mask, a in rows],
        rewards={
            name: sum(values) / len(values)
            for name, values in trainer._metrics["train"].items()
            if name.startswith("rewards/")
        },
    )
