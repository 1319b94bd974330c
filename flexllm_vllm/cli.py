"""Hangs the flags on vLLM's command line."""

import argparse
import dataclasses
import functools
from typing import Any

from flexllm_vllm.architectures import check_architecture
from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.cpu_defaults import apply_cpu_defaults
from flexllm_vllm.engine_args import apply_to_engine_args, check_combination
from flexllm_vllm.flags import GPU_MAX_TOKENS, add_flags, config_from_args
from flexllm_vllm.patches import cpu_compilation
from flexllm_vllm.release import check_vllm_release


def install() -> None:
    """Wraps vLLM's parser set-up and the steps from flags to engine arguments and from those to
    its configuration; once.

    General plugins are loaded inside ``AsyncEngineArgs.add_cli_args``, so the flags hang on
    ``EngineArgs.add_cli_args``, which it calls next.
    """
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_finetuning_flags", False):
        return
    EngineArgs._finetuning_flags = True
    cpu_compilation.apply_to_platform(lambda c: FinetuningConfig.from_vllm_config(c) is not None)
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(add_cli_args)
    def add_cli_args_with_finetuning(parser: Any) -> Any:
        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_args_with_finetuning(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = from_cli_args(cls, args)
        config = config_from_args(args)
        if config is not None:
            import vllm
            from vllm import envs
            from vllm.platforms import current_platform

            check_vllm_release(vllm.__version__)
            device = current_platform.device_name
            check_combination(engine_args, args, device, envs.VLLM_USE_RUST_FRONTEND)
            if device != "cpu" and getattr(args, "finetuning_max_tokens", None) is None:
                config = dataclasses.replace(config, max_tokens=GPU_MAX_TOKENS)
            before = dict(vars(engine_args))
            apply_to_engine_args(engine_args, config, device)
            # With several API servers the flags are handed to processes that turn them into engine
            # arguments before any plugin is loaded: they must find our choices in the flags.
            for name, value in vars(engine_args).items():
                if value is not before[name]:
                    setattr(args, name, value)
            if device != "cpu":
                return engine_args
            num_engines = engine_args.data_parallel_size_local or engine_args.data_parallel_size
            apply_cpu_defaults(num_engines * engine_args.tensor_parallel_size)
        return engine_args

    @functools.wraps(create_engine_config)
    def create_engine_config_with_finetuning(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create_engine_config(self, *args, **kwargs)
        # Before any process is started for the model, which takes half a minute to load.
        if FinetuningConfig.from_vllm_config(vllm_config) is not None:
            check_architecture(vllm_config.model_config.architectures)
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config_with_finetuning
    EngineArgs.add_cli_args = staticmethod(add_cli_args_with_finetuning)
    EngineArgs.from_cli_args = classmethod(from_cli_args_with_finetuning)
