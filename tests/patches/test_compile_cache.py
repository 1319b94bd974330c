from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig

from flexllm_vllm.config import KEY
from flexllm_vllm.patches import compile_cache
from flexllm_vllm.worker.cpu import GRAPH_OPTIONS, GRAPH_VERSION


def config_hash(**additional: object) -> str:
    return VllmConfig(additional_config=additional).compute_hash()


def test_finetuning_flags_are_not_part_of_the_hash() -> None:
    compile_cache.apply(KEY, GRAPH_VERSION, GRAPH_OPTIONS)
    plain = config_hash(other=1, **{KEY: {}})
    assert config_hash(other=1, **{KEY: {"dir": "a"}}) == plain
    assert config_hash(other=1, **{KEY: {"dir": "b"}}) == plain
    assert config_hash(other=2, **{KEY: {"dir": "a"}}) != plain


def test_what_changes_the_graph_is() -> None:
    """A graph made for one kind of weights cannot run the other."""
    compile_cache.apply(KEY, GRAPH_VERSION, GRAPH_OPTIONS)
    one, two = ({"dir": "a", "base_weights": copies} for copies in ("one-copy", "two-copies"))
    assert config_hash(**{KEY: one}) != config_hash(**{KEY: two})
    assert config_hash(**{KEY: one}) == config_hash(**{KEY: one | {"dir": "b"}})


def test_other_operations_in_the_graph_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of an earlier release would call what this one does not have."""
    compile_cache.apply(KEY, GRAPH_VERSION, GRAPH_OPTIONS)
    before = config_hash(**{KEY: {}})
    monkeypatch.setattr(VllmConfig, "compute_hash", VllmConfig.compute_hash.__wrapped__)  # type: ignore[attr-defined]
    compile_cache.apply(KEY, GRAPH_VERSION + 1, GRAPH_OPTIONS)
    assert config_hash(**{KEY: {}}) != before


def test_the_configuration_keeps_what_the_hash_leaves_out() -> None:
    compile_cache.apply(KEY, GRAPH_VERSION, GRAPH_OPTIONS)
    config = VllmConfig(additional_config={KEY: {"dir": "a"}})
    config.compute_hash()
    assert config.additional_config == {KEY: {"dir": "a"}}


def test_graphs_that_are_plain_functions_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=lambda x: x + 1))
    monkeypatch.setattr(torch.compiler, "load_compiled_function", lambda *_, **__: saved)
    compile_cache.load_plain_functions()
    loaded = torch.compiler.load_compiled_function(None)
    loaded._artifacts.compiled_fn.finalize_loading(None)
    assert loaded._artifacts.compiled_fn(1) == 2


def test_vllm_still_asks_what_plain_functions_lack() -> None:
    """Fails once vLLM loads the CPU's graphs by itself: then that patch may be needless."""
    from vllm.compilation import decorators

    source = Path(decorators.__file__).read_text()
    assert "loaded_fn._artifacts.compiled_fn.finalize_loading(" in source
