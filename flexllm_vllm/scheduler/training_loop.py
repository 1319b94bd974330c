"""The training loop of one job: which examples come next, when a step is due, when it is over."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from flexllm_vllm import checkpoints
from flexllm_vllm.checkpoints import Checkpoint
from flexllm_vllm.data.dataset import TokenizedDataset
from flexllm_vllm.data.order import batches, num_steps
from flexllm_vllm.jobs.types import FinetuningJob
from flexllm_vllm.plan import AdapterLayout, OptimizerStep, SaveAdapter, TrainAdapter
from flexllm_vllm.scheduler.batch import Batch, BatchKind
from flexllm_vllm.scheduler.evaluation import Evaluation, Progress
from flexllm_vllm.scheduler.learning_rate import learning_rate
from flexllm_vllm.scheduler.objective import Examples, Objective, objective_of
from flexllm_vllm.scheduler.pack import Pack, Sequence

MakePacks = Callable[["TrainingLoop", list[list[Sequence]], BatchKind], list[Pack]]

# Epochs, counted from the last, that end with a checkpoint where ``save_steps`` is not given.
EPOCHS_SAVED = 3


@dataclass(frozen=True)
class Save:
    """An adapter that is being written.

    Attributes:
        path: where it will be.
        step: whose weights it holds.
        served: requests may name it; otherwise it is there to go on from, or the final one.
        is_final: it is the result of the job.
        metrics: of the step.
    """

    path: Path
    step: int
    served: bool
    is_final: bool
    metrics: dict[str, Any]

    @property
    def written_to(self) -> str:
        """Where the worker writes it: a checkpoint gets its name when the store is up to it."""
        return str(self.path if self.is_final else checkpoints.unfinished(self.path))


@dataclass(frozen=True)
class _PlannedStep:
    """An optimizer step whose result the worker has yet to report."""

    step: int
    batch: Batch
    order: OptimizerStep


@dataclass
class TrainingLoop:
    """State machine of a running job; it knows nothing of vLLM.

    What was planned may be reported after more was planned (vLLM's asynchronous scheduling): a new
    step may be planned while another is not yet reported, except where weights are to be saved
    between the two.

    Args:
        job: the claimed job.
        dataset: its tokenised examples.
        make_packs: splits a batch into packs.
        base_model: path or hub name of the model, recorded in the adapter.
        validation: examples to evaluate on, or None.
        resume: checkpoint of this job to go on from, or None.
        checkpoint_interval_s: seconds from one checkpoint to the next.

    Attributes:
        layout: what the worker said of the adapter; None until it has created it.
        step: optimizer steps that are planned; ``progress`` counts those that are done.
        batch: what runs now.
        saving: what is being written.
        pausing: it stops as soon as a checkpoint holds all of it.
        service: tokens trained so far, each divided by the job's weight; a third of a token is its
            forward, two its backward.
    """

    job: FinetuningJob
    dataset: TokenizedDataset
    make_packs: MakePacks
    base_model: str
    validation: TokenizedDataset | None = None
    resume: Checkpoint | None = None
    checkpoint_interval_s: float = float("inf")
    started: bool = False
    layout: AdapterLayout | None = None
    batch: Batch | None = None
    saving: Save | None = None
    pausing: bool = False
    step: int = 0
    service: float = 0.0
    progress: Progress = field(default_factory=Progress)
    _evaluation: Evaluation | None = None
    _waiting: tuple[Examples, list[int], BatchKind] | None = None
    _batch_data: Examples | None = None
    _pending: deque[_PlannedStep] = field(default_factory=deque)
    _evaluated: dict[str, Any] | None = None
    _saved_step: int = 0

    def __post_init__(self) -> None:
        t = self.job.training
        self.objective: Objective = objective_of(self.job)
        self._train = Examples(self.dataset)
        self._valid = Examples(self.validation) if self.validation is not None else None
        count = self._num_items(self._train)
        self.total_steps = num_steps(count, t.batch_size, t.n_epochs, t.max_steps)
        self._steps_per_epoch = num_steps(count, t.batch_size, 1)
        if self.resume is not None:
            self.progress = Progress(**self.resume.state)
        self.step = self._saved_step = self.progress.step
        self._batches: Iterator[list[int]] = islice(
            batches(count, t.batch_size, t.n_epochs, t.max_steps, t.seed, t.shuffle),
            self.step,
            None,
        )
        self._step_began = self._last_save = time.monotonic()
        self._evaluate_if_due()

    def _num_items(self, data: Examples) -> int:
        return len(data.dataset) // self.objective.width

    @property
    def longest(self) -> int:
        """Tokens of the longest example, or of a pair of them, that has to fit into the caches."""
        data = [self._train, *([self._valid] if self._valid else [])]
        return max(x.longest for x in data) * self.objective.width

    @property
    def finished(self) -> bool:
        """No step is to be planned any more; the adapter is to be saved."""
        return self.step >= self.total_steps or self.progress.stopped

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
            resume_path=str(self.resume.path) if self.resume else None,
        )

    # -- batches -----------------------------------------------------------------------------

    def open_batch(self) -> Batch | None:
        """The current batch, the next one if none is open, None where nothing is to be run."""
        if self.batch is None and not self.pausing:
            if self._waiting is None:
                self._waiting = self._next_items()
            if self._waiting is not None:
                self.batch = self._make_batch(*self._waiting)
        return self.batch

    def _next_items(self) -> tuple[Examples, list[int], BatchKind] | None:
        if self._evaluation is not None:
            assert self._valid is not None
            items = self._evaluation.take()
            return None if items is None else (self._valid, items, BatchKind.SCORE)
        if self.finished or self.must_save:
            return None
        return self._train, next(self._batches), BatchKind.TRAIN

    def _make_batch(self, data: Examples, items: list[int], kind: BatchKind) -> Batch:
        """The batch of these items, or first one that scores them under the base model."""
        width = self.objective.width
        groups = [[item * width + k for k in range(width)] for item in items]
        if self.objective.needs_reference:
            unknown = [[i] for group in groups for i in group if i not in data.scores]
            if unknown:
                groups, kind = unknown, BatchKind.REFERENCE
        if kind is not BatchKind.REFERENCE:
            self._waiting = None
        sequences = [[self._sequence(data, i) for i in group] for group in groups]
        loss_tokens = sum(s.num_loss_tokens for group in sequences for s in group)
        self._batch_data = data
        return Batch(
            packs=self.make_packs(self, sequences, kind),
            num_tokens=sum(data.dataset.num_tokens(i) for group in groups for i in group),
            num_loss_tokens=loss_tokens,
            denominator=self.objective.denominator(len(groups), loss_tokens),
            kind=kind,
        )

    def _sequence(self, data: Examples, index: int) -> Sequence:
        ids, mask = data.dataset.example(index)
        return Sequence.of(ids, mask, index)

    def preference_of(self, pack: Pack) -> Any:
        """The loss of a pack of the current batch, where it is not the cross-entropy."""
        assert self.batch is not None
        assert self._batch_data is not None
        if not self.batch.kind.is_trained:
            return None
        return self.objective.preference(self._batch_data, pack, self.batch.denominator)

    @property
    def step_is_due(self) -> bool:
        """The optimizer step that follows the current batch can be planned."""
        batch = self.batch
        if batch is None or not (batch.kind.is_trained and batch.done):
            return False
        return not (self.must_save or (self._pending and self._save_follows))

    def close_batch(self) -> OptimizerStep:
        """The batch's work is planned: the optimizer step that follows it."""
        assert self.batch is not None
        assert self.batch.done
        t = self.job.training
        rate = learning_rate(
            t.lr_scheduler_type, t.learning_rate, self.step, self.total_steps, t.warmup_ratio
        )
        order = OptimizerStep(self.job.id, rate, t.max_grad_norm)
        self.step += 1
        self._pending.append(_PlannedStep(self.step, self.batch, order))
        self.batch = None
        self._evaluate_if_due()
        return order

    # -- results -----------------------------------------------------------------------------

    def pack_reported(self) -> None:
        """The worker has reported a pack. Of a batch that is scored it may be the last one."""
        batch = self.batch
        if batch is None or batch.kind.is_trained or not (batch.done and batch.reported):
            return
        self.batch = None
        assert self._batch_data is not None
        if batch.kind is BatchKind.REFERENCE:
            for pack in batch.packs:
                assert pack.result is not None
                for sequence, logp in zip(pack.sequences, pack.result.logps, strict=True):
                    self._batch_data.scores[sequence.example] = logp
            return
        evaluation = self._evaluation
        assert evaluation is not None
        evaluation.sums.add(self.objective.evaluate(self._batch_data, batch.packs))
        if evaluation.complete:
            self._evaluation = None
            self._evaluated = evaluation.sums.metrics()
            patience = self.job.training.early_stopping_patience
            self.progress.evaluated(evaluation.step, self._evaluated, patience)

    def take_evaluation(self) -> dict[str, Any] | None:
        """Metrics of an evaluation that has ended since the last call."""
        metrics, self._evaluated = self._evaluated, None
        return metrics

    def step_done(self, grad_norm: float) -> dict[str, Any]:
        """The worker has stepped. Returns what is published of the step.

        Names are those of ``transformers.Trainer``'s log; ``tokens_per_second`` counts the tokens
        of the examples, wall-clock time since the step before.
        """
        planned = self._pending.popleft()
        batch = planned.batch
        now = time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        progress = self.progress
        progress.step = planned.step
        progress.trained_tokens += batch.num_tokens
        more = self.objective.train_metrics(batch.packs, batch.num_loss_tokens)
        progress.metrics = {"step": planned.step, "train_loss": batch.loss, **more}
        return {
            "step": planned.step,
            "total_steps": self.total_steps,
            "train_loss": batch.loss,
            **more,
            "learning_rate": planned.order.learning_rate,
            "grad_norm": grad_norm,
            "tokens": batch.num_tokens,
            "tokens_per_second": batch.num_tokens / max(seconds, 1e-9),
        }

    # -- evaluations and checkpoints ---------------------------------------------------------

    def _ends_epoch(self, step: int) -> bool:
        return step % self._steps_per_epoch == 0 or step == self.total_steps

    def _evaluate_if_due(self) -> None:
        if self._valid is None or not self.step or self.progress.evaluated_step == self.step:
            return
        every = self.job.training.eval_steps
        due = self._ends_epoch(self.step) if every is None else self.step % every == 0
        if due or self.step == self.total_steps:
            self._evaluation = Evaluation(self._num_items(self._valid), self.step)

    @property
    def _is_settled(self) -> bool:
        """All that was planned is done: the weights are those of ``progress.step``."""
        return not self._pending and self._evaluation is None

    @property
    def must_save(self) -> bool:
        """A checkpoint that is to be served must be written before the next step."""
        progress = self.progress
        step = progress.step
        if not self._is_settled or not step or progress.served_step == step:
            return False
        is_best = self.job.training.load_best_model_at_end and progress.best_step == step
        return is_best or self._is_served(step)

    def _is_served(self, step: int) -> bool:
        """A checkpoint of this step is served, whatever its loss."""
        every = self.job.training.save_steps
        if every is not None:
            return step % every == 0
        remaining = -(-(self.total_steps - step) // self._steps_per_epoch)
        return self._ends_epoch(step) and remaining < EPOCHS_SAVED

    @property
    def _save_follows(self) -> bool:
        """The weights of the last planned step are to be saved once it is reported."""
        return self._is_served(self.step) or self._save_is_due

    @property
    def _save_is_due(self) -> bool:
        return time.monotonic() - self._last_save >= self.checkpoint_interval_s

    @property
    def result_step(self) -> int | None:
        """The checkpoint that is the result of a training that has finished; None: the adapter is
        yet to be written."""
        progress = self.progress
        if self.job.training.load_best_model_at_end and progress.best_step:
            return progress.best_step
        return progress.step if progress.served_step == progress.step else None

    @property
    def has_ended(self) -> bool:
        """Nothing is left to be planned: it is paused, or its result is a checkpoint."""
        if self.saving is not None or not self._is_settled or not self.ready:
            return False
        if self.pausing:
            return self.is_saved
        return self.finished and not self.must_save and self.result_step is not None

    def take_save(self) -> SaveAdapter | None:
        """What is to be written now: before anything else is planned, or it would be too late."""
        if self.saving is not None or not self._is_settled:
            return None
        if self.must_save and not self.pausing:
            # Recorded in the checkpoint itself, which is served as soon as it is complete.
            self.progress.served_step = self.progress.step
            return self._save_checkpoint(served=True)
        if self.pausing:
            return None if self.is_saved else self._save_checkpoint()
        if self.finished:
            if self.result_step is not None:
                return None
            return self._order(
                Save(self.job.adapter_path, self.progress.step, False, True, self.progress.metrics)
            )
        if self._save_is_due and not self.is_saved:
            return self._save_checkpoint()
        return None

    def save_now(self) -> SaveAdapter | None:
        """A checkpoint of what is done, where there is none: the engine ends."""
        if self.layout is None or self._pending or self.is_saved or self.saving:
            return None
        return self._save_checkpoint()

    @property
    def is_saved(self) -> bool:
        """A checkpoint holds all that is done."""
        return self._saved_step == self.progress.step

    def _save_checkpoint(self, served: bool = False) -> SaveAdapter:
        step = self.progress.step
        path = checkpoints.folder_of(self.job.checkpoints_path, step)
        return self._order(Save(path, step, served, False, dict(self.progress.metrics)))

    def _order(self, save: Save) -> SaveAdapter:
        self.saving = save
        self._last_save = time.monotonic()
        state = None if save.is_final else asdict(self.progress)
        return SaveAdapter(self.job.id, save.written_to, self.base_model, state)

    def saved(self) -> Save:
        """What was being written is written."""
        assert self.saving is not None
        save, self.saving = self.saving, None
        if not save.is_final:
            self._saved_step = save.step
        return save

    def hold(self) -> None:
        """Nothing more is planned; what is half-done is left out of the checkpoint."""
        self.pausing = True
        self.batch = self._evaluation = self._waiting = None
