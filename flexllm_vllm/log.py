"""Loggers that appear in the server's log."""

import logging


def get_logger(name: str) -> logging.Logger:
    """A logger below vLLM's own, whose handler, level and format it shares."""
    return logging.getLogger(f"vllm.{name}")
