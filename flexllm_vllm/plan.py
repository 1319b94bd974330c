"""What crosses the border between the engine process and the worker process.

The scheduler puts a :class:`StepPlan` into every iteration that holds finetuning work, the worker
answers with a :class:`StepResult`. Nothing else is shared: the scheduler decides, the worker
computes. All of it is plain data, pickled by vLLM's executor.

Within one iteration the worker works in this order, and the scheduler plans accordingly:
``end``, ``drop``, ``start``, ``open``, then ``backward``, ``save``, ``optimize``, then the forward
windows, as rows of the fused forward, and last the ``optional`` windows, as far as there is time.
An optimizer step and the first forward windows of the next batch may therefore share an iteration,
and what is saved is the adapter before that step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class TrainAdapter:
    """Create a trainable adapter in a LoRA slot of its own.

    Attributes:
        job_id: the job that owns it.
        lora_int_id: vLLM's integer id of the adapter, issued by the job store.
        r: rank of every pair of matrices.
        scaling: factor of ``B A``: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` (rsLoRA).
        target_modules: PEFT names of the linear layers (``q_proj`` ...).
        seed: of the initialisation of A.
        init_path: PEFT folder to continue from, or None for a fresh adapter.
        resume_path: checkpoint folder of this very job to go on from, or None.
        betas, eps, weight_decay: of AdamW.
        layers_to_transform: decoder layers that get matrices; None for all.
    """

    job_id: str
    lora_int_id: int
    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    seed: int
    init_path: str | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    layers_to_transform: tuple[int, ...] | None = None
    resume_path: str | None = None

    @property
    def scaling(self) -> float:
        """The factor of ``B A``, as in ``peft.tuners.lora``."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True)
class PackedSequence:
    """One finetuning sequence of a pack.

    Attributes:
        row_id: request id of its hidden row in vLLM's batch.
        targets: for each of its rows ``t`` the token that follows, or -1 where it carries no loss.
            A sequence of ``n`` tokens has at most ``n - 1`` rows: the last token predicts nothing.
    """

    row_id: str
    targets: tuple[int, ...]


@dataclass(frozen=True)
class PreferenceLoss:
    """DPO (arXiv 2305.18290, equation 7): sequences of the pack in pairs, the preferred one first.

    Attributes:
        beta: how far the policy may leave the reference.
        reference: log-probability of each sequence's targets without the adapter.
        num_pairs: of the whole optimizer batch; the loss is the mean over them.
    """

    beta: float
    reference: tuple[float, ...]
    num_pairs: int


@dataclass(frozen=True)
class OpenPack:
    """Sequences that run their backward together, as if concatenated.

    Attributes:
        pages: of the activation cache, for the rows of the concatenation.
        loss_denominator: loss-bearing tokens of the whole optimizer batch (not of this pack), so
            that the gradients of all packs add up to those of the batch's mean loss.
        score_only: nothing is differentiated; the worker answers with log-probabilities.
        preference: the loss is DPO's, not the cross-entropy.
    """

    pack_id: int
    job_id: str
    sequences: tuple[PackedSequence, ...]
    pages: tuple[int, ...]
    loss_denominator: int
    score_only: bool = False
    preference: PreferenceLoss | None = None

    @property
    def num_rows(self) -> int:
        return sum(len(s.targets) for s in self.sequences)


class ForwardWindow(NamedTuple):
    """Tokens ``[start, end)`` of a sequence: a hidden row of this iteration's batch.

    ``block_ids`` is the sequence's block table up to ``end``.
    """

    pack_id: int
    row_id: str
    start: int
    end: int
    block_ids: list[int]


class BackwardWindow(NamedTuple):
    """Rows ``[start, end)`` of a pack, in a layer or in several.

    ``layer == num_layers`` is the loss head, ``num_layers + 1`` the log-probabilities alone. The
    window goes from ``layer`` down to ``lowest``; through more than one layer only decoder layers,
    and with all rows of the pack. ``num_costly`` are the rows that have to be computed, where these
    are not all: the loss head does nothing for those without loss.
    """

    pack_id: int
    layer: int
    start: int
    end: int
    lowest: int
    num_costly: int | None = None

    @property
    def num_layers(self) -> int:
        return self.layer - self.lowest + 1

    @property
    def num_token_layers(self) -> int:
        rows = self.end - self.start if self.num_costly is None else self.num_costly
        return rows * self.num_layers

    def each_layer(self) -> Iterator["BackwardWindow"]:
        """The window's layers, each a window, in the order in which they run."""
        for layer in range(self.layer, self.lowest - 1, -1):
            yield self._replace(layer=layer, lowest=layer)


def aligned(start: int, step: int) -> int:
    """Where a window begins that is cut at ``start`` or after it: at a multiple of ``step``.

    A GEMM of rows that were not seen before has its code generated first (oneDNN, by number of
    rows: 0.7 ms, and seven of them in a window of a layer): few numbers of rows are to occur.
    """
    return -(-start // step) * step


class OptionalWindow(NamedTuple):
    """A backward window of one layer that runs after the forward, whole or its last rows alone, as
    far as the deadline of the plan allows.

    Attributes:
        window: all of it.
        fixed_ms: what it takes, whatever its rows.
        row_ms: what each of its rows takes that has to be computed; these come last.
        least: rows; fewer are not worth it.
    """

    window: BackwardWindow
    fixed_ms: float
    row_ms: float
    least: int

    @property
    def cost_ms(self) -> float:
        return self.fixed_ms + self.window.num_token_layers * self.row_ms


@dataclass(frozen=True)
class OptimizerStep:
    """Clip, step AdamW with this learning rate, and rewrite the adapter's slot."""

    job_id: str
    learning_rate: float
    max_grad_norm: float


@dataclass(frozen=True)
class SaveAdapter:
    """Write the adapter as a PEFT folder, in the background.

    Attributes:
        state: of the training loop, for a checkpoint that training can go on from; it is stored
            with the optimizer's moments. None: the adapter alone.
    """

    job_id: str
    path: str
    base_model: str
    state: dict[str, Any] | None = None


@dataclass
class StepPlan:
    """The finetuning work of one iteration, lists in the order of execution.

    Attributes:
        optional: what the worker runs until the deadline. Nothing else in the plan depends on it,
            and the scheduler takes for done what the result says, no more.
        deadline: by ``time.perf_counter()``, which all processes of a machine share.
    """

    end: list[str] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    start: list[TrainAdapter] = field(default_factory=list)
    open: list[OpenPack] = field(default_factory=list)
    backward: list[BackwardWindow] = field(default_factory=list)
    optimize: list[OptimizerStep] = field(default_factory=list)
    save: list[SaveAdapter] = field(default_factory=list)
    forward: list[ForwardWindow] = field(default_factory=list)
    optional: list[OptionalWindow] = field(default_factory=list)
    deadline: float = math.inf

    def __bool__(self) -> bool:
        return any((self.end, self.drop, self.start, self.open, self.backward, self.optimize,
                    self.save, self.forward, self.optional))  # fmt: skip


@dataclass(frozen=True)
class JobFailure:
    """Why a job cannot go on: a code and message in OpenAI's sense."""

    code: str
    message: str


@dataclass(frozen=True)
class AdapterLayout:
    """What the scheduler must know of an adapter that the worker has created.

    Attributes:
        tokens_per_page: of the activation cache, of packs that are trained.
        score_tokens_per_page: likewise of packs that are only scored.
        num_pages: of the activation cache, for all adapters together.
        lowest_layer: the backward ends with this layer.
    """

    tokens_per_page: int
    num_pages: int
    lowest_layer: int
    score_tokens_per_page: int


@dataclass(frozen=True)
class PackResult:
    """What came of a pack, sums over its loss-bearing tokens (or pairs), not yet divided.

    Attributes:
        loss: of the tokens; with a :class:`PreferenceLoss`, of the pairs.
        num_correct: tokens that the model would have chosen itself.
        logps: of each sequence, where they were asked for: its log-probability.
        rewards: of each sequence, with a :class:`PreferenceLoss`: ``beta (logp - reference)``.
    """

    loss: float
    num_correct: int = 0
    logps: tuple[float, ...] = ()
    rewards: tuple[float, ...] = ()


@dataclass
class StepResult:
    """What came of a :class:`StepPlan`.

    Attributes:
        started: adapters that were created, by job id.
        packs: by pack id, in the iteration in which its loss head (or its score) was finished.
        grad_norms: total norm before clipping, by job id, of each optimizer step.
        saved: folders that are complete.
        failures: jobs in whose work an exception was raised.
        optional: backward windows that were run of the plan's optional ones.
        optional_ms: how long they took.
    """

    started: dict[str, AdapterLayout] = field(default_factory=dict)
    packs: dict[int, PackResult] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    failures: dict[str, JobFailure] = field(default_factory=dict)
    optional: list[BackwardWindow] = field(default_factory=list)
    optional_ms: float = 0.0
