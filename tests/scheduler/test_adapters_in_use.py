"""What the API asks before the folder of a deleted adapter goes."""

from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.request import RequestStatus

from benchmarks.simulate.configuration import EngineSpec, make_scheduler
from benchmarks.simulate.engine import make_request
from benchmarks.simulate.scheduler import SimulatedScheduler


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
