"""What crosses the border between the engine process and the worker process.

The scheduler puts a :class:`StepPlan` into every iteration that holds finetuning work, the worker
answers with a :class:`StepResult`. Nothing else is shared: the scheduler decides, the worker
computes. All of it is plain data, pickled by vLLM's executor.

Within one iteration the worker works in this order, and the scheduler plans accordingly:
``end``, ``drop``, ``start``, ``open``, then ``backward``, ``optimize``, ``save``, and last the
forward windows, as rows of the fused forward. An optimizer step and the first forward windows of
the next batch may therefore share an iteration.
"""

from dataclasses import dataclass, field


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
class OpenPack:
    """Sequences of one optimizer batch that run their backward together, as if concatenated.

    Attributes:
        pages: of the activation cache, for the rows of the concatenation.
        loss_denominator: loss-bearing tokens of the whole optimizer batch (not of this pack), so
            that the gradients of all packs add up to those of the batch's mean loss.
    """

    pack_id: int
    job_id: str
    sequences: tuple[PackedSequence, ...]
    pages: tuple[int, ...]
    loss_denominator: int

    @property
    def num_rows(self) -> int:
        return sum(len(s.targets) for s in self.sequences)


@dataclass(frozen=True, slots=True)
class ForwardWindow:
    """Tokens ``[start, end)`` of a sequence: a hidden row of this iteration's batch."""

    pack_id: int
    row_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BackwardWindow:
    """Rows ``[start, end)`` of a pack in one layer; ``layer == num_layers`` is the loss head."""

    pack_id: int
    layer: int
    start: int
    end: int


@dataclass(frozen=True)
class OptimizerStep:
    """Clip, step AdamW with this learning rate, and rewrite the adapter's slot."""

    job_id: str
    learning_rate: float
    max_grad_norm: float


@dataclass(frozen=True)
class SaveAdapter:
    """Write the adapter as a PEFT folder."""

    job_id: str
    path: str
    base_model: str


@dataclass
class StepPlan:
    """The finetuning work of one iteration, lists in the order of execution."""

    end: list[str] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    start: list[TrainAdapter] = field(default_factory=list)
    open: list[OpenPack] = field(default_factory=list)
    backward: list[BackwardWindow] = field(default_factory=list)
    optimize: list[OptimizerStep] = field(default_factory=list)
    save: list[SaveAdapter] = field(default_factory=list)
    forward: list[ForwardWindow] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.end, self.drop, self.start, self.open, self.backward, self.optimize,
                    self.save, self.forward))  # fmt: skip


@dataclass(frozen=True)
class JobFailure:
    """Why a job cannot go on: a code and message in OpenAI's sense."""

    code: str
    message: str


@dataclass(frozen=True)
class AdapterLayout:
    """What the scheduler must know of an adapter that the worker has created.

    Attributes:
        tokens_per_page: of the activation cache.
        num_pages: of the activation cache, for all adapters together.
        lowest_layer: the backward ends with this layer.
    """

    tokens_per_page: int
    num_pages: int
    lowest_layer: int


@dataclass
class StepResult:
    """What came of a :class:`StepPlan`.

    Attributes:
        started: adapters that were created, by job id.
        losses: summed loss of a pack's loss-bearing tokens (not yet divided), by pack id; present
            in the iteration in which the pack's loss head was finished.
        grad_norms: total norm before clipping, by job id, of each optimizer step.
        saved: jobs whose adapter folder is complete.
        failures: jobs in whose work an exception was raised.
    """

    started: dict[str, AdapterLayout] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    failures: dict[str, JobFailure] = field(default_factory=dict)
