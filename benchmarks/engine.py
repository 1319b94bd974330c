"""A vLLM engine in a process of its own, timed without HTTP: stock, or with finetuning enabled.

``python -m benchmarks.engine`` reads one JSON order a line from stdin and answers with one JSON
line, so that several engines can be measured in turn within one run (:class:`Engine`).
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def all_cores() -> dict[str, str]:
    """The machine that finetuning's defaults give, for every engine: all cores, Intel's OpenMP."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    iomp = Path(sys.prefix) / "lib" / "libiomp5.so"
    return {"VLLM_CPU_OMP_THREADS_BIND": cores} | (
        {"LD_PRELOAD": str(iomp)} if iomp.exists() else {}
    )


class Engine:
    """The parent's side: an engine that sleeps while others are measured.

    Args:
        model: folder of the model.
        log: file for its output.
        finetuning: folder of the job store; None for stock vLLM.
        options: more arguments of ``vllm.LLM``.
    """

    def __init__(
        self, model: str, log: Path, finetuning: Path | None = None, **options: Any
    ) -> None:
        environment = {**os.environ, **all_cores(), "VLLM_LOGGING_LEVEL": "WARNING"}
        self._log = log
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.order("load", model=model, finetuning=finetuning and str(finetuning), options=options)

    def order(self, kind: str, **arguments: Any) -> Any:
        """Sends an order and waits for its answer."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"order": kind, **arguments}) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the engine died, see {self._log}")
        return json.loads(answer)

    def decode_ms(self, rows: int, tokens: int = 48, adapter: str | None = None) -> float:
        """Median time of an iteration that holds ``rows`` decode tokens."""
        return float(self.order("decode", rows=rows, tokens=tokens, adapter=adapter))

    def prefill_ms(self, tokens: int, adapter: str | None = None) -> float:
        """Time of an iteration that holds one prompt of so many tokens."""
        return float(self.order("prefill", tokens=tokens, adapter=adapter))

    def logprobs(self, tokens: int, adapter: str | None = None) -> list[float]:
        """Log-probabilities of a fixed prompt's tokens."""
        return list(self.order("logprobs", tokens=tokens, adapter=adapter))

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(60)


class _Served:
    """The child's side."""

    def __init__(self, model: str, finetuning: str | None, options: dict[str, Any]) -> None:
        from vllm import LLM

        options = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 29,
                   "enable_prefix_caching": False, "seed": 0, **options}  # fmt: skip
        if finetuning is not None:
            options = {**finetuning_options(Path(finetuning)), **options}
        self._llm = LLM(model, **options)
        self._random = random.Random(0)

    def _prompt(self, tokens: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [self._random.randrange(100, 40_000) for _ in range(tokens)]}

    def _steps(self, prompts: list[Any], tokens: int, adapter: str | None) -> list[float]:
        """Seconds of each iteration of these requests."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        engine = self._llm.llm_engine
        for prompt in prompts:
            engine.add_request(str(self._random.random()), prompt, params, **_lora(adapter))
        seconds = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def decode(self, rows: int, tokens: int, adapter: str | None) -> float:
        steps = self._steps([self._prompt(8) for _ in range(rows)], tokens, adapter)[2:]
        return 1e3 * sorted(steps)[len(steps) // 2]

    def prefill(self, tokens: int, adapter: str | None) -> float:
        return 1e3 * min(sum(self._steps([self._prompt(tokens)], 1, adapter)) for _ in range(3))

    def logprobs(self, tokens: int, adapter: str | None) -> list[float]:
        from vllm import SamplingParams

        ids = [random.Random(1).randrange(100, 40_000) for _ in range(tokens)]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        out = self._llm.generate(
            {"prompt_token_ids": ids}, params, use_tqdm=False, **_lora(adapter)
        )
        return [x[t].logprob for x, t in zip(out[0].prompt_logprobs[1:], ids[1:], strict=True)]


def _lora(adapter: str | None) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    return {"lora_request": LoRARequest("adapter", 1, adapter)} if adapter else {}


def finetuning_options(folder: Path, **flags: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that ``--enable-finetuning`` amounts to."""
    from vllm.engine.arg_utils import EngineArgs

    from flexllm_vllm.config import FinetuningConfig
    from flexllm_vllm.engine_args import apply_to_engine_args

    args = EngineArgs(model="unused")
    apply_to_engine_args(args, FinetuningConfig(dir=folder, **flags))
    names = ("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules", "scheduler_cls",
             "worker_cls", "async_scheduling", "disable_hybrid_kv_cache_manager",
             "additional_config")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def main() -> None:
    """Orders: ``load``, ``decode``, ``prefill``, ``logprobs``; ends with its input."""
    # vLLM prints to standard output; the answers need it for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    served: _Served | None = None
    for line in sys.stdin:
        order = json.loads(line)
        kind = order.pop("order")
        if kind == "load":
            served, answer = _Served(**order), None
        else:
            answer = getattr(served, kind)(**order)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
