"""What tests of the data share."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    """The tokenizer of SmolLM2-135M-Instruct, as ``make model`` converts it."""
    from transformers import AutoTokenizer

    spec = importlib.util.spec_from_file_location("demo_model", ROOT / "setup" / "demo_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = module.demo_model_path()
    if not path.exists():
        pytest.skip("the demo model is not there: make model")
    return AutoTokenizer.from_pretrained(path)
