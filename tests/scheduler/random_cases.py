"""Configurations of a small engine, its requests and its jobs, drawn at random."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from benchmarks.simulate.configuration import EngineSpec
from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.plan import AdapterLayout

LAYERS = 3


@dataclass(frozen=True)
class SomeRequest:
    """At which iteration it arrives, and is aborted (None: never)."""

    at: int
    prompt: tuple[int, ...]
    output: int
    abort: int | None


@dataclass(frozen=True)
class SomeJob:
    at: int
    lengths: tuple[int, ...]
    batch_size: int
    n_epochs: int
    weight: float
    unmasked_from: int
    cancel: int | None


@dataclass(frozen=True)
class Case:
    blocks: int
    block_size: int
    max_num_seqs: int
    max_tokens: int
    finetuning_tokens: int
    max_rows: int
    layout: AdapterLayout
    tpot_slo_ms: float | None
    requests: tuple[SomeRequest, ...]
    jobs: tuple[SomeJob, ...]
    budgets: tuple[float, ...]
    prefix_caching: bool = False
    resets: tuple[int, ...] = ()

    @property
    def spec(self) -> EngineSpec:
        return EngineSpec(
            num_layers=LAYERS, max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_tokens, num_blocks=self.blocks + 1,
            block_size=self.block_size, prefix_caching=self.prefix_caching,
            finetuning=FinetuningConfig(
                max_tokens=self.finetuning_tokens, max_jobs=4, tpot_slo_ms=self.tpot_slo_ms
            ),
        )  # fmt: skip

    @property
    def longest(self) -> int:
        """Rows of the longest sequence that can be trained."""
        kept = self.layout.num_pages * self.layout.tokens_per_page
        return min(kept, self.blocks * self.block_size)


@st.composite
def cases(draw: Any, prefix_caching: bool = False) -> Case:
    block_size = draw(st.sampled_from([4, 16]))
    blocks = draw(st.integers(3, 40))
    room = blocks * block_size
    seqs = draw(st.integers(1, 6))
    token = st.integers(3, 5)  # few, so that prefixes are shared

    def some_request() -> SomeRequest:
        length = draw(st.integers(1, min(90, room - 2)))
        prompt = draw(st.lists(token, min_size=length, max_size=length)) if prefix_caching else [
            3
        ] * length  # fmt: skip
        return SomeRequest(
            at=draw(st.integers(0, 60)),
            prompt=tuple(prompt),
            output=draw(st.integers(1, min(40, room - 1 - length))),
            abort=draw(st.none() | st.integers(0, 90)) if draw(st.booleans()) else None,
        )

    def some_job() -> SomeJob:
        lengths = st.integers(2, max(2, min(room + 1, 90)))
        return SomeJob(
            at=draw(st.integers(0, 30)),
            lengths=tuple(draw(st.lists(lengths, min_size=1, max_size=8))),
            batch_size=draw(st.integers(1, 5)),
            n_epochs=draw(st.integers(1, 2)),
            weight=draw(st.sampled_from([0.5, 1.0, 3.0])),
            unmasked_from=draw(st.integers(1, 20)),
            cancel=draw(st.integers(0, 80)) if draw(st.integers(0, 3)) == 0 else None,
        )

    return Case(
        blocks=blocks,
        block_size=block_size,
        max_num_seqs=seqs,
        max_tokens=draw(st.integers(max(16, seqs), 96)),
        finetuning_tokens=draw(st.integers(16, 128)),
        max_rows=draw(st.integers(1, 6)),
        layout=AdapterLayout(
            tokens_per_page=draw(st.sampled_from([4, 8])),
            num_pages=draw(st.integers(2, 40)),
            lowest_layer=draw(st.integers(0, LAYERS - 1)),
            score_tokens_per_page=64,
        ),
        tpot_slo_ms=draw(st.none() | st.floats(5.0, 200.0)),
        requests=tuple(some_request() for _ in range(draw(st.integers(0, 12)))),
        jobs=tuple(some_job() for _ in range(draw(st.integers(1, 3)))),
        budgets=tuple(draw(st.lists(st.floats(0.0, 100.0), max_size=6))),
        prefix_caching=prefix_caching,
        resets=tuple(draw(st.lists(st.integers(0, 60), max_size=2))) if prefix_caching else (),
    )
