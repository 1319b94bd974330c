from vllm.config import VllmConfig

from flexllm_vllm.config import KEY
from flexllm_vllm.patches import compile_cache


def config_hash(**additional: object) -> str:
    return VllmConfig(additional_config=additional).compute_hash()


def test_finetuning_flags_are_not_part_of_the_hash() -> None:
    compile_cache.apply(KEY)
    plain = config_hash(other=1)
    assert config_hash(other=1, **{KEY: {"dir": "a"}}) == plain
    assert config_hash(other=1, **{KEY: {"dir": "b"}}) == plain
    assert config_hash(other=2, **{KEY: {"dir": "a"}}) != plain


def test_the_configuration_keeps_what_the_hash_leaves_out() -> None:
    compile_cache.apply(KEY)
    config = VllmConfig(additional_config={KEY: {"dir": "a"}})
    config.compute_hash()
    assert config.additional_config == {KEY: {"dir": "a"}}
