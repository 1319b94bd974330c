"""Finetuning alone, against HF PEFT: speed, memory and losses. ``make bench-train``."""
