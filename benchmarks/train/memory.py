"""Memory that finetuning adds to a server, against a PEFT process of its own."""

import threading
from pathlib import Path
from typing import Any

from benchmarks.train.systems import OurSystem, PeftSystem
from benchmarks.train.workload import LORA, synthetic

LENGTH = 512


def on_worker_token_bytes(worker: Any) -> int:
    """Bytes that a token keeps between forward and backward, all linears trained."""
    from flexllm_vllm.models.base import TrainedLinears
    from flexllm_vllm.worker.trainer import kept_per_token

    model = worker._backward
    kept = kept_per_token(model, worker._policy, TrainedLinears.all(model.num_layers))
    return sum(kept.values()) * model.dtype.itemsize


def measure_memory(model: str, adapter: Path, peft: PeftSystem, folder: Path) -> dict[str, Any]:
    """Peaks in MiB, and bytes kept per token; one engine at a time."""
    results: dict[str, Any] = {"length": LENGTH}
    batches = synthetic(LENGTH, 2)
    for checkpointing in (False, True):
        name = "peft_checkpointing" if checkpointing else "peft"
        peft.order("load", model=model, adapter=str(adapter), dtype="float32",
                   checkpointing=checkpointing)  # fmt: skip
        saved = peft.saved_bytes(batches[0][0]) / LENGTH
        peft.run(batches)
        results[name] = {"saved_bytes_per_token": saved, "peak_mib": peft.peak_mib}
    for policy, base_weights in (
        ("store", "auto"),
        ("balanced", "auto"),
        ("minimal", "auto"),
        ("minimal", "one-copy"),
    ):
        name = f"{policy}/{base_weights}"
        system = OurSystem(
            model, folder / name, "float32", activation_policy=policy, base_weights=base_weights
        )
        try:
            results[name] = _server(system, batches, adapter)
            if name == "balanced/auto":
                results["long"] = _long(system, adapter)
        finally:
            system.close()
        print("memory", name, results[name], flush=True)
    return results


def _server(system: OurSystem, batches: Any, adapter: Path) -> dict[str, float]:
    """Peak with a job less the peak without, under the same requests."""

    def traffic() -> None:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(range(100, 300))} for _ in range(4)]
        system.llm.generate(prompts, SamplingParams(max_tokens=32), use_tqdm=False)

    traffic()
    system.reset_peak()
    traffic()
    without = system.memory("VmHWM")
    job = threading.Thread(target=system.run, args=(batches, LORA, adapter))
    job.start()
    traffic()
    job.join()
    return {
        "saved_bytes_per_token": system.llm.collective_rpc(on_worker_token_bytes)[0],
        "peak_without_mib": without,
        "added_mib": system.memory("VmHWM") - without,
    }


def _long(system: OurSystem, adapter: Path) -> dict[str, float]:
    """One sequence of 8,192 tokens in the default activation cache."""
    system.reset_peak()
    ((seconds, loss),) = system.run(synthetic(8192, 1), LORA, adapter)
    return {"tokens": 8192, "seconds": seconds, "loss": loss, "peak_mib": system.memory("VmHWM")}
