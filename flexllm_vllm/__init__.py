"""Co-serving for vLLM: LoRA finetuning inside the batches that serve requests."""

__version__ = "0.1.0"
