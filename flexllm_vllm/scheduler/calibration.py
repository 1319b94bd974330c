"""Measures iterations of every kind on the real engine, before it serves.

A few requests and a finetuning job of random tokens run through ``schedule()``, the worker and
``update_from_output()`` like any other. Their outputs go nowhere, and nothing of them stays: no
request, no prefix in the cache, no adapter.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from flexllm_vllm.data.dataset import DatasetBuilder
from flexllm_vllm.jobs.types import (
    ALL_TARGET_MODULES,
    FinetuningJob,
    JobStatus,
    LoraSpec,
    TrainingSpec,
)
from flexllm_vllm.log import get_logger
from flexllm_vllm.scheduler.budget import Budget
from flexllm_vllm.scheduler.latency_model import IterationWork
from flexllm_vllm.scheduler.planner import Planner
from flexllm_vllm.scheduler.training_loop import TrainingLoop

logger = get_logger(__name__)

Sample = tuple[IterationWork, float]

# A slow machine stops here with what it has.
MAX_SECONDS = 30.0
BATCH = 2
# Tokens of an example, as a share of the largest part: within a list of parts as below a batch runs
# forward and backward, so that each kind of work is seen in each company.
SEQUENCE = 3 / 8
# Finetuning parts, as shares of the largest: alone, and as small as beside requests.
LARGE = (1 / 2, 1.0, 1 / 4, 1 / 2)
SMALL = (1 / 16, 1 / 64, 1 / 8, 1 / 16, 1 / 32, 1 / 16, 1 / 4, 1 / 64, 1 / 8, 1 / 32)
# Optimizer steps at the start that allocate, and on some machines compile.
WARM_UP_STEPS = 1
JOB_ID = "calibration"
# The store issues ids from 1 on.
LORA_INT_ID = 2**31 - 1


class Calibration:
    """Runs the engine through a fixed list of iterations.

    Args:
        engine: vLLM's engine core, before its loop starts.
        scheduler: its scheduler.
        planner: plans the finetuning part of its iterations.
        max_tokens: of the largest finetuning window.

    Attributes:
        budget: of the iteration that comes.
        samples: what was measured.
    """

    def __init__(self, engine: Any, scheduler: Any, planner: Planner, max_tokens: int) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._planner = planner
        self._max_tokens = max_tokens
        model_config = scheduler.vllm_config.model_config
        self._vocab_size: int = model_config.get_vocab_size()
        self._max_length: int = model_config.max_model_len
        self._random = random.Random(0)
        self._requests: list[str] = []
        self._recording = False
        self.budget = Budget.of_tokens(0)
        self.samples: list[Sample] = []

    def observe(self, work: IterationWork, duration_ms: float) -> None:
        """Takes in a measured iteration."""
        if self._recording:
            self.samples.append((work, duration_ms))

    def run(self) -> list[Sample]:
        """Measures; leaves the engine as it was."""
        began = time.monotonic()
        try:
            for recording in self._iterations():
                self._recording = recording
                self._engine.step()
                if time.monotonic() - began > MAX_SECONDS:
                    break
        finally:
            self._clean_up()
        return self.samples

    def _iterations(self) -> Iterator[bool]:
        """Prepares one iteration after the other; whether it is to be recorded."""
        self._add_request(16, 4)
        yield from [False] * 4
        rows = min(4, self._scheduler.max_num_running_reqs)
        long = max(16, min(self._max_tokens, self._max_length // 2))
        for prompt, count in ((16, 1), (64, rows), (long, 1)):
            for _ in range(count):
                self._add_request(prompt, 6)
            yield from [True] * 6
        self._planner.add(self._loop(long))
        while not self._planner.loops[JOB_ID].ready:
            yield False
        while self._planner.loops[JOB_ID].step < WARM_UP_STEPS:
            self.budget = Budget.of_tokens(self._max_tokens)
            yield False
        # Parts that differ from one iteration to the next tell what each costs. Those that matter
        # most come first, the slowest last, lest a slow machine stop before it has seen them.
        for sizes, beside in ((SMALL, 1), (SMALL, 0), (SMALL, rows), (LARGE, 0)):
            for _ in range(beside):
                self._add_request(16, len(sizes) + 2)
            if beside:
                self.budget = Budget.of_tokens(0)
                yield False  # their prompts
            for share in sizes:
                size = max(4, int(self._max_tokens * share))
                self.budget = Budget.of_tokens(size)
                yield True

    def _add_request(self, prompt_tokens: int, max_tokens: int) -> None:
        length = max(1, min(prompt_tokens, self._max_length - max_tokens - 1))
        request = Request(
            request_id=f"{JOB_ID}-{len(self._requests)}",
            prompt_token_ids=self._tokens(length),
            sampling_params=SamplingParams(
                temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
            ),
            pooling_params=None,
            block_hasher=getattr(self._engine, "request_block_hasher", None),
        )
        self._requests.append(request.request_id)
        self._scheduler.add_request(request)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]

    def _loop(self, longest: int) -> TrainingLoop:
        """A job without end."""
        builder = DatasetBuilder()
        length = max(16, min(int(SEQUENCE * self._max_tokens), longest))
        for _ in range(8):
            builder.add(self._tokens(length), [0] + [1] * (length - 1))
        config = self._scheduler.vllm_config.lora_config
        training = TrainingSpec(
            batch_size=BATCH, max_seq_length=length, seed=0, n_epochs=10_000, learning_rate=1e-6
        )
        # Those that the model has.
        lora = LoraSpec(r=min(16, config.max_lora_rank), target_modules=ALL_TARGET_MODULES)
        job = FinetuningJob(
            id=JOB_ID, model=JOB_ID, status=JobStatus.RUNNING, training_file=JOB_ID, suffix=None,
            lora=lora, training=training, hyperparameters={},
            created_at=0, started_at=0, finished_at=None, trained_tokens=0, step=0, total_steps=0,
            adapter_name=JOB_ID, fine_tuned_model=None, adapter_int_id=LORA_INT_ID,
            init_adapter_path=None, folder=Path(JOB_ID), error=None, cancel_requested=False,
            attempts=1, organization_id=JOB_ID,
        )  # fmt: skip
        return TrainingLoop(job, builder.build(), self._planner.make_packs, JOB_ID)

    def _clean_up(self) -> None:
        self._recording = False
        self.budget = Budget.of_tokens(0)
        self._planner.remove(JOB_ID)
        self._planner.packs.reset()
        self._scheduler.finish_requests(self._requests, RequestStatus.FINISHED_ABORTED)
        # The worker hears of what has ended with the next iteration.
        for _ in range(2):
            self._engine.step()
        self._scheduler.reset_prefix_cache()
