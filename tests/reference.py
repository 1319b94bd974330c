"""What we compare with: HF transformers and PEFT, autograd, torch's AdamW."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

Example = tuple[list[int], list[int]]


def load_peft(model: str | Path, adapter: str | Path) -> PeftModel:
    """The base model in float32 with a trainable adapter.

    Its attention is the eager one: torch's fused one leaves out what it does not know (the soft cap
    of Gemma 2). So are its experts: torch's grouped ones have no float64.
    """
    base = AutoModelForCausalLM.from_pretrained(
        str(model), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)


def round_inputs(model: PeftModel, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The frozen linears round their inputs, which the gradient does not see."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0] + (rounded(inputs[0]) - inputs[0]).detach()

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer.register_forward_pre_hook(hook)


def loss_sum(model: PeftModel, example: Example) -> torch.Tensor:
    """Summed cross-entropy of the loss-bearing tokens, as transformers shifts them."""
    token_ids, loss_mask = example
    logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    labels = torch.tensor(
        [t if m else -100 for t, m in zip(token_ids[1:], loss_mask[1:], strict=True)]
    )
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def accumulate(model: PeftModel, batch: list[Example]) -> float:
    """Backward of the batch's mean loss; returns the loss."""
    denominator = sum(sum(mask[1:]) for _, mask in batch)
    total = 0.0
    for example in batch:
        loss = loss_sum(model, example) / denominator
        loss.backward()
        total += float(loss.detach())
    return total


def lora_tensors(model: PeftModel, what: str) -> dict[str, torch.Tensor]:
    """``"<module path>.A"``/``".B"`` -> the weights (``what="data"``) or their gradients."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            path, letter = name.removeprefix("base_model.model.").split(".lora_")
            found[f"{path}.{letter[0]}"] = getattr(parameter, what).clone()
    return found


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``."""
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))
