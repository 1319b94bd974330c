"""Inference and finetuning side by side, against sharing time or cores. ``make bench-coserve``."""
