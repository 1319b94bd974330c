"""The training loop of one job: which examples come next, when a step is due, when it is over."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flexllm_vllm.data.dataset import TokenizedDataset
from flexllm_vllm.data.order import batches, num_steps
from flexllm_vllm.jobs.types import FinetuningJob
from flexllm_vllm.plan import AdapterLayout, OptimizerStep, SaveAdapter, TrainAdapter
from flexllm_vllm.scheduler.learning_rate import learning_rate
from flexllm_vllm.scheduler.pack import Pack, PackPhase, Sequence


@dataclass
class Batch:
    """The examples of one optimizer step.

    Attributes:
        packs: in the order in which they run.
        num_tokens: of the examples, as they are counted and billed.
        loss_denominator: loss-bearing tokens; the loss of the step is the mean over them.
    """

    packs: list[Pack]
    num_tokens: int
    loss_denominator: int

    @property
    def done(self) -> bool:
        """The backward of every pack is planned."""
        return all(pack.phase is PackPhase.DONE for pack in self.packs)

    @property
    def loss(self) -> float:
        """Mean loss, once the worker has reported every pack's."""
        return sum(pack.loss or 0.0 for pack in self.packs) / self.loss_denominator


@dataclass
class TrainingLoop:
    """State machine of a running job; it knows nothing of vLLM.

    Args:
        job: the claimed job.
        dataset: its tokenised examples.
        make_packs: splits a batch into packs.
        base_model: path or hub name of the model, recorded in the adapter.

    Attributes:
        layout: what the worker said of the adapter; None until it has created it.
        service: tokens trained so far, each divided by the job's weight; a third of a token is its
            forward, two its backward.
    """

    job: FinetuningJob
    dataset: TokenizedDataset
    make_packs: Callable[["TrainingLoop", list[Sequence]], list[Pack]]
    base_model: str
    started: bool = False
    layout: AdapterLayout | None = None
    saving: bool = False
    batch: Batch | None = None
    step: int = 0
    trained_tokens: int = 0
    service: float = 0.0
    _pending: tuple[Batch, OptimizerStep] | None = None
    _step_began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        t = self.job.training
        count = len(self.dataset)
        self.total_steps = num_steps(count, t.batch_size, t.n_epochs, t.max_steps)
        self._batches: Iterator[list[int]] = iter(
            batches(count, t.batch_size, t.n_epochs, t.max_steps, t.seed, t.shuffle)
        )

    @property
    def finished(self) -> bool:
        """All steps are planned; the adapter is to be saved."""
        return self.step >= self.total_steps

    @property
    def ready(self) -> bool:
        """The worker has its adapter."""
        return self.layout is not None

    def serve(self, tokens: float) -> None:
        """Counts tokens that are planned for it."""
        self.service += tokens / self.job.training.scheduling_weight

    def start(self) -> TrainAdapter:
        """What the worker needs to create the adapter."""
        job, t = self.job, self.job.training
        self.started = True
        return TrainAdapter(
            job_id=job.id,
            lora_int_id=job.adapter_int_id,
            r=job.lora.r,
            lora_alpha=job.lora.lora_alpha,
            use_rslora=job.lora.use_rslora,
            target_modules=tuple(job.lora.target_modules),
            seed=t.seed,
            init_path=str(job.init_adapter_path) if job.init_adapter_path else None,
            betas=(t.adam_beta1, t.adam_beta2),
            eps=t.adam_epsilon,
            weight_decay=t.weight_decay,
            layers_to_transform=job.lora.layers_to_transform,
        )

    def save(self) -> SaveAdapter:
        """The order to write the finished adapter into the job's folder."""
        self.saving = True
        return SaveAdapter(self.job.id, str(self.job.adapter_path), self.base_model)

    def open_batch(self) -> Batch | None:
        """The current optimizer batch, the next one if none is open, None after the last."""
        if self.batch is None and not self.finished:
            indices = next(self._batches)
            examples = [self.dataset.example(index) for index in indices]
            sequences = [Sequence.of(list(ids), list(mask)) for ids, mask in examples]
            self.batch = Batch(
                packs=self.make_packs(self, sequences),
                num_tokens=sum(len(ids) for ids, _ in examples),
                loss_denominator=sum(s.num_loss_tokens for s in sequences),
            )
        return self.batch

    def close_batch(self) -> OptimizerStep:
        """The batch's work is planned: the optimizer step that follows it."""
        assert self.batch is not None
        assert self.batch.done
        t = self.job.training
        rate = learning_rate(
            t.lr_scheduler_type, t.learning_rate, self.step, self.total_steps, t.warmup_ratio
        )
        order = OptimizerStep(self.job.id, rate, t.max_grad_norm)
        self._pending = (self.batch, order)
        self.batch = None
        self.step += 1
        return order

    def step_done(self, grad_norm: float) -> dict[str, Any]:
        """The worker has stepped. Returns what is published of the step.

        Names are those of ``transformers.Trainer``'s log; ``tokens_per_second`` counts the tokens
        of the examples, wall-clock time since the step before.
        """
        assert self._pending is not None
        (batch, order), self._pending = self._pending, None
        now = time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        self.trained_tokens += batch.num_tokens
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "train_loss": batch.loss,
            "learning_rate": order.learning_rate,
            "grad_norm": grad_norm,
            "tokens": batch.num_tokens,
            "tokens_per_second": batch.num_tokens / max(seconds, 1e-9),
        }
