"""The two systems under test, behind one interface: ``run(batches) -> (seconds, loss) of each``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import finetuning_options
from benchmarks.machine import memory_mib, reset_peak
from flexllm_vllm.cpu_defaults import apply_cpu_defaults
from flexllm_vllm.data.dataset import DatasetBuilder
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import JobStatus, LoraSpec, NewJob, TrainingSpec

Example = tuple[list[int], list[int]]
Timed = list[tuple[float, float]]
MAX_LENGTH = 8192
# Nobody waits for the end of an iteration here: on a slow machine the default would cut windows
# short. What `--finetuning-ttft-slo-ms` is for, on a server that does nothing but train.
TTFT_SLO_MS = 8000.0


class PeftSystem:
    """HF PEFT in a child process, which sleeps while others are measured."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "peft.json"
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train.peft_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "peft.log").open("w"),
            text=True,
        )
        self.peak_mib = 0.0

    def order(self, kind: str, **arguments: Any) -> dict[str, Any]:
        """Sends an order and waits for its answer."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"order": kind, **arguments}) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError("the PEFT process died, see peft.log")
        return json.loads(answer)

    def run(self, batches: list[list[Example]]) -> Timed:
        self._data.write_text(json.dumps(batches))
        answer = self.order("steps", data=str(self._data))
        self.peak_mib = answer["peak_mib"]
        return [tuple(step) for step in answer["steps"]]

    def saved_bytes(self, example: Example) -> int:
        self._data.write_text(json.dumps([[example]]))
        return int(self.order("saved", data=str(self._data))["bytes"])

    def close(self) -> None:
        self._child.kill()
        self._child.wait()


class OurSystem:
    """The real engine, driven through the job store as the server drives it."""

    def __init__(self, model: str, folder: Path, dtype: str, **flags: Any) -> None:
        from vllm import LLM

        apply_cpu_defaults()
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for the functions of profile.py
        self._store = JobStore(folder / "store")
        self.llm = LLM(
            model,
            dtype=dtype,
            max_model_len=MAX_LENGTH,
            max_num_seqs=8,
            served_model_name="base",
            kv_cache_memory_bytes=1 << 30,
            seed=0,
            **finetuning_options(folder / "store", ttft_slo_ms=TTFT_SLO_MS, **flags),
        )
        self.pids = _descendants(os.getpid())

    def run(
        self, batches: list[list[Example]], lora: LoraSpec, adapter: Path | None = None
    ) -> Timed:
        """Trains on the batches in order; the time of a step ends when the engine reports it."""
        job_id, folder = self._store.new_job()
        builder = DatasetBuilder()
        for batch in batches:
            for ids, mask in batch:
                builder.add(ids, mask)
        builder.build().save(folder)
        source = folder / "examples.jsonl"
        source.write_text('{"prompt": "a", "completion": "b"}\n')
        with source.open("rb") as stream:
            file = self._store.files.create(stream, source.name, "fine-tune")
        training = TrainingSpec(
            max_seq_length=MAX_LENGTH, seed=0, shuffle=False, batch_size=len(batches[0]),
            n_epochs=1, learning_rate=1e-4, lr_scheduler_type="constant", warmup_ratio=0.0,
            max_grad_norm=1.0,
        )  # fmt: skip
        self._store.create_job(
            NewJob(
                id=job_id, model="base", adapter_name=f"ft:{job_id}", training_file=file.id,
                lora=lora, training=training, total_steps=0, hyperparameters={},
                init_adapter_path=str(adapter) if adapter else None, metadata=None,
            )
        )  # fmt: skip
        while not (job := self._store.get_job(job_id)).status.finished:
            time.sleep(0.05)
        if job.status is not JobStatus.SUCCEEDED:
            raise RuntimeError(f"the job failed: {job.error}")
        events, _ = self._store.list_events(job_id, limit=10_000)
        steps = sorted(
            (e.data for e in events if e.type == "metrics" and e.data), key=lambda d: d["step"]
        )
        return [(s["tokens"] / s["tokens_per_second"], s["train_loss"]) for s in steps]

    def profile(self, batches: list[list[Example]], lora: LoraSpec, adapter: Path) -> Any:
        """Time by operation; everything that is run later is timed too, and so a little slower."""
        from benchmarks.train import profile

        self.llm.collective_rpc(profile.on_worker_start_profile)
        self.run(batches, lora, adapter)
        return self.llm.collective_rpc(profile.on_worker_end_profile)[0]

    def memory(self, field: str) -> float:
        """MiB of all its processes but this one."""
        return sum(memory_mib(pid, field) for pid in self.pids)

    def reset_peak(self) -> None:
        for pid in self.pids:
            reset_peak(pid)

    def close(self) -> None:
        self._store.close()
        self.llm.llm_engine.engine_core.shutdown()


def _descendants(pid: int) -> list[int]:
    """Processes below this one that run the engine."""
    found = []
    for task in Path("/proc").glob("[0-9]*"):
        try:
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and "peft_process" not in (task / "cmdline").read_text():
            found += [int(task.name), *_descendants(int(task.name))]
    return found
