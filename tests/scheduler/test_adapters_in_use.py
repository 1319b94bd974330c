"""What keeps the engine alive when an adapter is deleted."""

from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.request import RequestStatus

from benchmarks.simulate.configuration import EngineSpec, make_scheduler
from benchmarks.simulate.engine import make_request
from benchmarks.simulate.scheduler import SimulatedScheduler
from flexllm_vllm.jobs.adapter_folder import close_folder, remove_folder


def test_waiting_and_running_requests_use_their_adapters() -> None:
    spec = EngineSpec(num_layers=2, max_num_seqs=1, num_blocks=64)
    scheduler = make_scheduler(SimulatedScheduler, spec, clock=lambda: 0.0)
    engine: Any = type("Engine", (), {"scheduler": scheduler})()
    for name, adapter in (("running", 7), ("waiting", 9), ("same", 9), ("base", None)):
        request = make_request(name, [1, 2, 3], 4)
        if adapter is not None:
            request.lora_request = LoRARequest(f"ft:{adapter}", adapter, "path")
        scheduler.add_request(request)
    scheduler.schedule()
    assert [request.request_id for request in scheduler.running] == ["running"]
    in_use = EngineCoreProc.finetuning_adapters_in_use  # what the API process calls
    assert in_use(engine) == [7, 9]
    scheduler.finish_requests(["running", "same"], RequestStatus.FINISHED_ABORTED)
    assert in_use(engine) == [9]
    scheduler.finish_requests("waiting", RequestStatus.FINISHED_ABORTED)
    assert in_use(engine) == []


def test_a_request_for_a_deleted_adapter_is_refused_as_it_arrives(tmp_path: Path) -> None:
    scheduler = make_scheduler(
        SimulatedScheduler, EngineSpec(num_layers=2, num_blocks=64), clock=lambda: 0.0
    )
    values = {"scheduler": scheduler, "mm_receiver_cache": None, "request_block_hasher": None}
    engine: Any = type("Engine", (), values)()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")

    def arrive(lora: LoRARequest | None) -> str:
        request = EngineCoreRequest(
            request_id="r",
            prompt_token_ids=[1],
            mm_features=None,
            sampling_params=SamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=lora,
            cache_salt=None,
            data_parallel_rank=None,
        )
        return EngineCoreProc.preprocess_add_request(engine, request)[0].request_id

    ours = LoRARequest("ft:a", 500_000_000, str(folder))
    assert arrive(ours) == "r"
    close_folder(folder)
    with pytest.raises(FileNotFoundError, match="deleted"):
        arrive(ours)
    remove_folder(folder)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="deleted"):
        arrive(ours)
    # Of --lora-modules, loaded before, and of the base model.
    assert arrive(LoRARequest("static", 1, "org/adapter")) == "r"
    assert arrive(None) == "r"
    for gone in (close_folder, remove_folder):
        gone(folder)
