"""The real engine, driven without HTTP: jobs go through the store, gradients are read back.

The functions below named ``on_worker`` run inside the worker process (vLLM's ``collective_rpc``).
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.data.dataset import DatasetBuilder
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import (
    DATASET_FILE,
    VALIDATION_FILE,
    FinetuningJob,
    LoraSpec,
    Method,
    NewJob,
    TrainingSpec,
)


def engine_options(folder: Path, **flags: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that ``--enable-finetuning`` amounts to."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from flexllm_vllm.engine_args import apply_to_engine_args

    args = EngineArgs(model="unused")
    config = FinetuningConfig(dir=folder, **flags)
    apply_to_engine_args(args, config, current_platform.device_name)
    names = ("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules", "scheduler_cls",
             "worker_cls", "async_scheduling", "disable_hybrid_kv_cache_manager",
             "additional_config")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def submit(
    store: JobStore,
    model: str,
    examples: list[tuple[list[int], list[int]]],
    lora: LoraSpec,
    training: TrainingSpec,
    init_adapter_path: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    validation: list[tuple[list[int], list[int]]] | None = None,
    method: Method = "supervised",
) -> FinetuningJob:
    """Queues a job on ``(token_ids, loss_mask)`` examples, as the API would."""
    job_id, folder = store.new_job()
    for name, rows in ((DATASET_FILE, examples), (VALIDATION_FILE, validation or [])):
        builder = DatasetBuilder()
        for token_ids, loss_mask in rows:
            builder.add(token_ids, loss_mask)
        if rows:
            builder.build().save(folder / name)
    source = folder / "examples.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}\n')
    with source.open("rb") as stream:
        file = store.files.create(stream, "examples.jsonl", "fine-tune")
    return store.create_job(
        NewJob(
            id=job_id,
            model=model,
            adapter_name=f"ft:{job_id}",
            training_file=file.id,
            lora=lora,
            training=training,
            total_steps=0,
            hyperparameters={},
            init_adapter_path=str(init_adapter_path) if init_adapter_path else None,
            metadata=metadata,
            validation_file=file.id if validation else None,
            method=method,
        )
    )


def wait(store: JobStore, job_id: str, timeout: float = 300) -> FinetuningJob:
    """Waits until the job has ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        job = store.get_job(job_id)
        if job.status.finished:
            return job
        time.sleep(0.1)
    raise TimeoutError(f"{job_id} did not end within {timeout} s: {store.get_job(job_id)}")


def step_metrics(store: JobStore, job_id: str) -> list[dict[str, Any]]:
    """Metrics of each optimizer step, in order."""
    events, more = store.list_events(job_id, limit=10_000)
    assert not more
    return sorted(
        (e.data for e in events if e.type == "metrics" and e.data), key=lambda d: d["step"]
    )


def on_worker_record_gradients(worker: Any) -> None:
    """Keeps a copy of the gradients of every optimizer step from now on."""
    from flexllm_vllm.worker.adapter import TrainableAdapter

    worker.recorded_gradients = []
    if not hasattr(TrainableAdapter, "step_unrecorded"):
        TrainableAdapter.step_unrecorded = TrainableAdapter.step

    def step(self: Any, learning_rate: float, max_grad_norm: float) -> float:
        worker.recorded_gradients.append(
            {path: (a.clone(), b.clone()) for path, (a, b) in self.gradients().items()}
        )
        return self.step_unrecorded(learning_rate, max_grad_norm)

    TrainableAdapter.step = step


def on_worker_save_gradients(worker: Any, path: str) -> None:
    """Writes what was recorded: a list of steps, each path -> (dA, dB), for ``torch.load``."""
    import torch

    if worker.rank == 0:  # every rank has recorded the same
        torch.save(worker.recorded_gradients, path)


def on_worker_count_optional(worker: Any) -> None:
    """Counts the backward windows that are run until a deadline, from now on."""
    trainer = worker._trainer
    run, worker.optional_windows = trainer.run_optional, []

    def run_optional(plan: Any) -> None:
        run(plan)
        offered = {(x.window.pack_id, x.window.layer, x.window.start) for x in plan.optional}
        for window in trainer._result.optional:
            is_cut = (window.pack_id, window.layer, window.start) not in offered
            worker.optional_windows.append(is_cut)

    trainer.run_optional = run_optional


def on_worker_optional_windows(worker: Any) -> list[bool]:
    """Of each whether it was cut."""
    found: list[bool] = worker.optional_windows
    return found


def on_worker_break_backward(worker: Any) -> None:
    """Makes the backward of layer 1 raise, once."""
    model = worker._trainer.model
    working = model.layer_backward

    def broken(layer: int, *args: Any) -> Any:
        if layer == 1:
            model.layer_backward = working
            raise RuntimeError("injected")
        return working(layer, *args)

    model.layer_backward = broken


def on_worker_break_capture(worker: Any) -> None:
    """Makes the next capture of activations raise, in the middle of a forward."""
    cache = worker._trainer._cache
    working = cache.write

    def broken(kept: Any, key: tuple[int, str], *args: Any) -> None:
        if key[0] == 1:
            cache.write = working
            raise RuntimeError("injected")
        working(kept, key, *args)

    cache.write = broken


def on_worker_is_quantised(worker: Any) -> bool:
    """Whether all linears of the decoder layers are."""
    from flexllm_vllm.models.quantised import is_quantised

    layers = worker._trainer.model._decoder.weights._layers
    return all(is_quantised(module) for layer in layers for module in layer.values())


def on_worker_pid(worker: Any) -> int:
    return os.getpid()


def on_worker_lora_ids(worker: Any) -> list[int | None]:
    """The adapter in each LoRA slot."""
    return list(worker.model_runner.lora_manager._adapter_manager.lora_index_to_id)


def on_worker_training_slots(worker: Any) -> dict[int, int]:
    """Slot of each adapter in training, by its id in vLLM."""
    manager = worker.model_runner.lora_manager._adapter_manager
    adapters = worker._trainer.adapters.values()
    ids = [adapter.spec.lora_int_id for adapter in adapters]
    return {int_id: manager.lora_index_to_id.index(int_id) for int_id in ids}


def on_worker_keep(worker: Any, policy: str, dtype: str = "auto") -> None:
    """Sets what is kept of a forward, and how, for the jobs that start from now on."""
    from flexllm_vllm.worker.activation_codec import build_codec

    trainer = worker._trainer
    trainer._policy = policy
    trainer._cache.codec = build_codec(trainer.model.dtype, dtype)


def on_worker_record_paths(worker: Any) -> bool:
    """Notes for each forward from now on which graph it runs; False where none is compiled."""
    from vllm.forward_context import get_forward_context

    model = worker.model_runner.model
    if model.model.do_not_compile:
        return False
    worker.paths = []

    def note(*_: Any) -> None:
        has_adapters = type(model.model).__name__.endswith("WithAdapters")
        graph = "with adapters" if has_adapters else "base"
        worker.paths.append("layers" if get_forward_context().skip_compiled else graph)

    model.register_forward_pre_hook(note)
    return True


def on_worker_take_paths(worker: Any) -> list[str]:
    """What was noted since the last call."""
    taken, worker.paths = worker.paths, []
    return taken


def remove(path: Path) -> None:
    """A file or folder, whatever it is."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def on_worker_runner(worker: Any) -> str:
    """The module of vLLM's model runner."""
    return type(worker.model_runner).__module__
