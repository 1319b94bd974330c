import pytest

from flexllm_vllm.models.registry import check_architecture


def test_an_unsupported_architecture_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"OPTForCausalLM.*supported: LlamaForCausalLM"):
        check_architecture(["OPTForCausalLM"])


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_dense_decoders_built_like_llama_are_supported(family: str) -> None:
    check_architecture([f"{family}ForCausalLM"])
