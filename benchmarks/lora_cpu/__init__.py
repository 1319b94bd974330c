"""LoRA inference on CPU, against stock vLLM: ``make bench-lora``."""
