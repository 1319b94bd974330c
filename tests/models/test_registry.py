import pytest

from flexllm_vllm.models.registry import check_architecture


def test_an_unsupported_architecture_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"OPTForCausalLM.*supported: LlamaForCausalLM"):
        check_architecture(["OPTForCausalLM"])


def test_llama_is_supported() -> None:
    check_architecture(["LlamaForCausalLM"])
