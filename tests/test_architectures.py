import json
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from flexllm_vllm import cli
from flexllm_vllm.architectures import check_architecture


def test_an_unsupported_architecture_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"OPTForCausalLM.*supported: LlamaForCausalLM"):
        check_architecture(["OPTForCausalLM"])


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_dense_decoders_built_like_llama_are_supported(family: str) -> None:
    check_architecture([f"{family}ForCausalLM"])


def test_it_is_refused_before_any_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    monkeypatch.setattr(cli, "apply_cpu_defaults", lambda num_workers: None)
    cli.install()
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2,
              "n_head": 2, "n_embd": 64, "n_positions": 64, "vocab_size": 100}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    parser = make_arg_parser(FlexibleArgumentParser())

    def create(*flags: str) -> None:
        args = parser.parse_args(["--model", str(tmp_path), "--skip-tokenizer-init", *flags])
        AsyncEngineArgs.from_cli_args(args).create_engine_config()

    create()
    with pytest.raises(ValueError, match="does not support the architecture GPT2LMHeadModel"):
        create("--enable-finetuning")
