"""Which model architectures can be finetuned, by their names in a model's configuration.

They are built alike (``models/decoder.py``): what differs from one to the other is read off vLLM's
modules. Apart from ``models``, so that a process without a model can refuse one.
"""

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GraniteForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)


def check_architecture(architectures: list[str]) -> None:
    """Raises ValueError for a model that cannot be finetuned."""
    if not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        raise ValueError(
            f"--enable-finetuning does not support the architecture {', '.join(architectures)}; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
