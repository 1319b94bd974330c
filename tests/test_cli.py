"""The flags, through vLLM's own parser."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname

from flexllm_vllm import cli
from flexllm_vllm import engine_args as finetuning_args
from flexllm_vllm.config import KEY, FinetuningConfig
from flexllm_vllm.release import check_vllm_release
from flexllm_vllm.worker.mixin import FinetuningWorkerMixin


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    cli.install()
    return make_arg_parser(FlexibleArgumentParser())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the process's environment as it is."""
    monkeypatch.setattr(cli, "apply_cpu_defaults", lambda num_workers: None)


def engine_args(parser: FlexibleArgumentParser, *flags: str) -> AsyncEngineArgs:
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "m", *flags]))


def test_the_flags_have_a_group_of_their_own(parser: FlexibleArgumentParser) -> None:
    group = next(g for g in parser._action_groups if g.title == "Finetuning")
    names = {option for action in group._group_actions for option in action.option_strings}
    assert {
        "--enable-finetuning", "--finetuning-dir", "--finetuning-max-jobs",
        "--finetuning-max-lora-rank", "--finetuning-max-tokens",
        "--finetuning-activation-cache-tokens", "--finetuning-tpot-slo-ms",
    } <= names  # fmt: skip


def test_one_flag_is_enough(parser: FlexibleArgumentParser) -> None:
    args = engine_args(parser, "--enable-finetuning")
    assert args.scheduler_cls == finetuning_args.SCHEDULER
    assert args.worker_cls == finetuning_args.WORKERS["cpu"]
    assert args.enable_lora
    assert args.max_lora_rank == FinetuningConfig().max_lora_rank
    assert args.shutdown_timeout > 0
    assert FinetuningConfig.from_dict(args.additional_config[KEY]) == FinetuningConfig()


def test_a_process_without_the_plugin_gets_the_same_from_the_flags(
    parser: FlexibleArgumentParser,
) -> None:
    flags = parser.parse_args(["--model", "m", "--enable-finetuning"])
    ours = AsyncEngineArgs.from_cli_args(flags)
    assert AsyncEngineArgs.from_cli_args(flags) == ours
    stock = AsyncEngineArgs.from_cli_args.__wrapped__(AsyncEngineArgs, flags)
    assert stock == ours


def test_without_the_flag_nothing_changes(parser: FlexibleArgumentParser) -> None:
    args, stock = engine_args(parser), AsyncEngineArgs(model="m")
    names = ["scheduler_cls", "worker_cls", "enable_lora", "max_loras", "max_lora_rank"]
    names += ["lora_target_modules", "shutdown_timeout", "dtype", "async_scheduling"]
    for name in names:
        assert (getattr(args, name) or None) == (getattr(stock, name) or None), name
    assert not args.additional_config


def test_values_come_from_a_yaml_file(parser: FlexibleArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"enable-finetuning: true\nfinetuning-max-jobs: 3\nfinetuning-dir: {tmp_path}\n"
        "finetuning-tpot-slo-ms: 80.5\n"
    )
    args = engine_args(parser, "--config", str(file))
    config = FinetuningConfig.from_dict(args.additional_config[KEY])
    assert (config.max_jobs, config.dir, config.tpot_slo_ms) == (3, tmp_path, 80.5)


def test_limits_are_sizes_and_numbers(parser: FlexibleArgumentParser) -> None:
    args = engine_args(
        parser, "--enable-finetuning", "--finetuning-max-file-bytes", "2Gi",
        "--finetuning-max-disk-bytes", "200g", "--finetuning-max-files", "7",
        "--finetuning-max-queued-jobs", "8", "--finetuning-max-examples", "9",
    )  # fmt: skip
    config = FinetuningConfig.from_dict(args.additional_config[KEY])
    assert (config.max_file_bytes, config.max_disk_bytes) == (2 << 30, 200 * 10**9)
    assert (config.max_files, config.max_queued_jobs, config.max_examples) == (7, 8, 9)
    assert FinetuningConfig().max_file_bytes == 512 << 20
    assert FinetuningConfig().max_disk_bytes is None


def test_the_users_lora_settings_stay(parser: FlexibleArgumentParser) -> None:
    args = engine_args(
        parser, "--enable-finetuning", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "128"
    )
    assert (args.max_loras, args.max_lora_rank, args.lora_target_modules) == (2, 128, None)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--finetuning-max-jobs", "0"], "--finetuning-max-jobs"),
        (["--finetuning-max-tokens", "3"], "--finetuning-max-tokens"),
        (["--finetuning-max-lora-rank", "17"], "--finetuning-max-lora-rank"),
        (["--finetuning-activation-cache-tokens", "1"], "--finetuning-activation-cache-tokens"),
        (["--finetuning-tpot-slo-ms", "-1"], "--finetuning-tpot-slo-ms"),
        (["--finetuning-max-file-bytes", "0"], "--finetuning-max-file-bytes"),
        (["--finetuning-max-files", "0"], "--finetuning-max-files"),
        (["--finetuning-max-disk-bytes", "1K"], "--finetuning-max-disk-bytes"),
        (["--finetuning-max-queued-jobs", "0"], "--finetuning-max-queued-jobs"),
        (["--finetuning-max-examples", "0"], "--finetuning-max-examples"),
        (["--distributed-executor-backend", "ray"], "--distributed-executor-backend"),
        (["--tensor-parallel-size", "2", "--fully-sharded-loras"], "--fully-sharded-loras"),
        (["--decode-context-parallel-size", "2"], "--decode-context-parallel-size"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype"),
        (["--scheduler-cls", "my.Scheduler"], "--scheduler-cls"),
        (["--worker-cls", "my.Worker"], "--worker-cls"),
        (["--finetuning-attention-backend", "xformers"], "xformers has no kernels for CPUs"),
        (["--headless"], "--headless"),
        (["--grpc"], "--grpc"),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
         "--speculative-config"),
        (["--no-disable-hybrid-kv-cache-manager"], "--no-disable-hybrid-kv-cache-manager"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(
    parser: FlexibleArgumentParser, flags: list[str], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        engine_args(parser, "--enable-finetuning", *flags)


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        (["--headless"], {}, "--headless: it has no API server"),
        ([], {"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND: the Rust front-end"),
        (["--api-server-count", "2"], {"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND"),
    ],
)
def test_servers_without_python_routes_end_at_their_start(
    parser: FlexibleArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    environment: dict[str, str],
    named: str,
) -> None:
    """``vllm serve`` itself, before it starts any process. That of gRPC needs a package
    that vLLM does not install; it takes the same step first."""
    from vllm.entrypoints.cli import serve

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_RUST_FRONTEND_PATH", "/bin/false")
    monkeypatch.setattr(serve, "setup_server", lambda *_, **__: ("", None))
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)  # they would outlive the test
    args = parser.parse_args(["--model", "m", "--port", "0", "--enable-finetuning", *flags])
    with pytest.raises(ValueError, match=re.escape(named)):
        serve.ServeSubcommand.cmd(args)


def test_a_finetuning_flag_alone_is_refused(parser: FlexibleArgumentParser) -> None:
    with pytest.raises(ValueError, match="--finetuning-max-jobs has no effect without"):
        engine_args(parser, "--finetuning-max-jobs", "2")


def test_other_platforms_are_refused() -> None:
    args = AsyncEngineArgs(model="m")
    with pytest.raises(ValueError, match="rocm"):
        finetuning_args.check_combination(args, Namespace(), "rocm")


@pytest.mark.parametrize("device", list(finetuning_args.WORKERS))
def test_each_platform_has_its_worker(device: str) -> None:
    args = AsyncEngineArgs(model="m")
    finetuning_args.check_combination(args, Namespace(), device)
    finetuning_args.apply_to_engine_args(args, FinetuningConfig(), device)
    worker = resolve_obj_by_qualname(args.worker_cls)
    assert issubclass(worker, FinetuningWorkerMixin)
    assert args.async_scheduling is None  # as vLLM chooses


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0.0+cpu"])
def test_another_release_of_vllm_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=r"0\.32"):
        check_vllm_release(version)


def test_the_supported_releases() -> None:
    for version in ("0.32.0", "0.32.1", "0.32.0+cpu"):
        check_vllm_release(version)


def test_webhooks_go_to_public_addresses_unless_allowed(parser: FlexibleArgumentParser) -> None:
    for flags, allowed in (([], False), (["--finetuning-webhook-allow-private"], True)):
        args = engine_args(parser, "--enable-finetuning", *flags)
        config = FinetuningConfig.from_dict(args.additional_config[KEY])
        assert config.webhook_allow_private is allowed
    with pytest.raises(ValueError, match="--finetuning-webhook-allow-private has no effect"):
        engine_args(parser, "--finetuning-webhook-allow-private")


def test_trackers_travel_to_the_other_processes(
    parser: FlexibleArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    (tmp_path / "key").write_text("k" * 40)
    flags = ["--enable-finetuning", "--finetuning-report-to", "wandb", "mlflow"]
    flags += ["--finetuning-wandb-key-file", str(tmp_path / "key")]
    sent = json.dumps(engine_args(parser, *flags).additional_config)
    assert "kkkk" not in sent
    config = FinetuningConfig.from_dict(json.loads(sent)[KEY])
    assert config.report_to == ("wandb", "mlflow")
    assert config.wandb_key_file == tmp_path / "key"
    with pytest.raises(ValueError, match=r"--finetuning-wandb-key-file .* cannot be read"):
        engine_args(parser, *flags[:-1], str(tmp_path / "none"))
