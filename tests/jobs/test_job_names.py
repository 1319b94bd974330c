from pathlib import Path

import pytest

from flexllm_vllm.jobs.names import adapter_name, base_name, check_suffix
from flexllm_vllm.jobs.types import LoraSpec


def test_an_adapter_is_named_as_openai_does() -> None:
    name = adapter_name("demo", "local", "json", "ftjob-abcdefghijklmnop")
    assert name == "ft:demo:local:json:abcdefgh"
    assert adapter_name("demo", "local", None, "ftjob-abcdefghijklm") == "ft:demo:local::abcdefgh"


@pytest.mark.parametrize(
    ("served", "base"),
    [
        ("demo", "demo"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/models/SmolLM2/", "SmolLM2"),
        ("./SmolLM2", "SmolLM2"),
        ("~/SmolLM2", "SmolLM2"),
        ("a/b/SmolLM2", "SmolLM2"),
        ("C:\\models\\SmolLM2", "SmolLM2"),
    ],
)
def test_a_name_is_never_a_path(served: str, base: str) -> None:
    assert base_name(served) == base


def test_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "SmolLM2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_name("models/SmolLM2") == "SmolLM2"


@pytest.mark.parametrize("suffix", ["a:b", "a/b", "..", "-a", "ä", "a b", "a\n", "a" * 65])
def test_an_unsafe_suffix_is_refused(suffix: str) -> None:
    with pytest.raises(ValueError, match="at most 64"):
        check_suffix(suffix)


def test_a_safe_suffix_is_taken() -> None:
    check_suffix("My_json-v1.2")
    check_suffix("a" * 64)


def test_target_modules_have_one_order() -> None:
    spec = LoraSpec(target_modules=("v_proj", "q_proj"))
    assert spec.target_modules == ("q_proj", "v_proj")
    with pytest.raises(ValueError, match="target_modules"):
        LoraSpec(target_modules=("lm_head",))
