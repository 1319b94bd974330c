"""Train a LoRA adapter while the server answers questions, then compare the two models."""
