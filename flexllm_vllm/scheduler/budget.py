"""How much finetuning an iteration may hold: what fits into its latency target."""

from dataclasses import dataclass

from flexllm_vllm.log import get_logger
from flexllm_vllm.scheduler.latency_model import IterationWork, LatencyModel
from flexllm_vllm.scheduler.margin import LATE_SHARE, Margin

logger = get_logger(__name__)

# Without --finetuning-tpot-slo-ms: an iteration with inference may take so many times what it would
# take without finetuning.
AUTO_MULTIPLE = 2.5
# ... but at least this: 100 tokens a second are fast enough, and where an iteration takes a
# millisecond or two, its fixed costs alone would leave finetuning nothing.
MIN_AUTO_MS = 10.0
# ... and at least what an iteration with so many finetuning tokens takes, and a little more: where
# the fixed costs of finetuning are beyond the multiple, a job would wait for the last request,
# however long. By the calibration alone: a target that rises with what is learnt of iterations that
# fill it would have no end.
MIN_AUTO_TOKENS = 8
MIN_AUTO_ROOM = 1.3
# Without --finetuning-ttft-slo-ms: an iteration without inference may take so many times the target
# of one with it. A request that arrives during it waits for its end.
IDLE_MULTIPLE = 4.0
# So many iterations after the last request the target stays as it was: a client that asks again at
# once does not wait for a long iteration, and finetuning is soon back at full speed.
LINGER = 3
# Of the TTFT target, what may be spent waiting for the iteration in which the request arrives.
IDLE_SHARE_OF_TTFT = 0.5
MIN_COST_MS = 1e-3
# An iteration without inference holds at least so many tokens, whatever the target.
MIN_IDLE_TOKENS = 16
# After so many iterations with inference that left nothing to finetuning, or in which the worker
# found no time for it, one gets MIN_IDLE_TOKENS: were it the model that is wrong (a machine that
# was busy during the calibration), it would never find out. So few do not show in a 99th
# percentile.
PATIENCE = 250
# Of the iterations with inference one in so many holds no finetuning, more at the start: filled to
# the same target all of them say the same, and what inference takes alone, of which the target is
# a multiple, can be told from none. One with a backward that was timed by itself, and no forward,
# tells it too.
ALONE_EVERY = 40
ALONE_EVERY_AT_FIRST = 8
FIRST = 80
# What the worker ends at a deadline is over a little later: the last window is longer than it was
# expected to be, and its results have yet to be taken in. By so much at the start, and at most; and
# so many may be over by more, at the start.
OVERRUN_AT_START, MAX_OVERRUN = 1.12, 1.2
BEYOND_OVERRUN = 0.01
# Such an iteration ends when so much of its target is over: what all of them fill to the same
# millisecond, a token's way to the client would make late.
FILLED = 0.97


@dataclass(frozen=True)
class Budget:
    """What the finetuning part of an iteration may cost, and what its parts cost, in milliseconds.

    Attributes:
        total: of the iteration.
        firm: what of it may be spent on what must run to its end, where there is a deadline.
        deadline_ms: from the iteration's begin, when the worker is to end the backward; None where
            it runs to the end of what is planned.
        forward: of a token's forward through all layers.
        backward: of a token's backward through all layers.
        max_tokens: bound of the forward tokens, whatever they cost.
        rows: once, if the iteration holds forward tokens.
        window: of a backward window, beside its tokens.
        step: of an optimizer step.
        room: forward tokens up to the knee, where reading the weights takes as long as computing.
        beyond: of a token's forward, additionally, beyond it.
    """

    total: float
    forward: float
    backward: float
    max_tokens: int
    rows: float = 0.0
    window: float = 0.0
    step: float = 0.0
    room: float = 0.0
    beyond: float = 0.0
    firm: float = 0.0
    deadline_ms: float | None = None

    def forward_cost(self, num_tokens: float) -> float:
        """Of so many tokens' forward."""
        if num_tokens <= 0:
            return 0.0
        more = max(0.0, num_tokens - self.room)
        return self.rows + num_tokens * self.forward + more * self.beyond

    def forward_tokens(self, limit: float, behind: float = 0.0) -> float:
        """Tokens whose forward, and ``behind`` for each, cost no more than ``limit``."""
        left, each = limit - self.rows, self.forward + behind
        if left <= self.room * each:
            return max(0.0, left / each)
        return (left + self.room * self.beyond) / (each + self.beyond)

    def mixed_tokens(self, limit: float) -> float:
        """Forward tokens of an iteration that runs as many backward beside them; 0 where a forward
        and a backward alone, in turn, make more progress.

        A few forward tokens ride on the rows that are there anyway, but every forward with
        finetuning tokens has a fixed cost.
        """
        mixed = self._tokens_together(limit)
        return mixed if mixed >= max(1.0, self._tokens_in_turn(limit)) else 0.0

    def tokens(self, limit: float) -> float:
        """Tokens that an iteration takes both forward and backward, at best and on average."""
        return max(self._tokens_together(limit), self._tokens_in_turn(limit))

    def _tokens_together(self, limit: float) -> float:
        return self.forward_tokens(limit - self.window, self.backward)

    def _tokens_in_turn(self, limit: float) -> float:
        forward = min(self.forward_tokens(limit), self.max_tokens)
        backward = max(0.0, limit - self.window) / self.backward
        return forward * backward / max(forward + backward, 1e-9)

    @classmethod
    def of_tokens(cls, num_tokens: int) -> "Budget":
        """A number of tokens; a token's forward counts as one, and so does its backward."""
        return cls(num_tokens, 1.0, 1.0, num_tokens)


@dataclass(frozen=True)
class OptionalWork:
    """What of an iteration was run until its deadline.

    Attributes:
        work: backward windows.
        duration_ms: of them.
        planned_ms: of the whole iteration.
        was_cut: there was more to do, so that it took as long as it was allowed to.
    """

    work: IterationWork
    duration_ms: float
    planned_ms: float
    was_cut: bool


class LatencyBudget:
    """Turns latency targets into the budget of each iteration.

    Args:
        max_tokens: finetuning tokens of any iteration.
        tpot_slo_ms: target of an iteration that holds inference; None: :data:`AUTO_MULTIPLE` times
            what its decode rows take alone, or more (:data:`MIN_AUTO_TOKENS`).
        ttft_slo_ms: bounds iterations that hold none; None: :data:`IDLE_MULTIPLE` times the target
            beside one decode row.
        num_in_flight: iterations that are scheduled at once: a request that arrives waits for all
            of them, so that those without inference share their bound.
        has_deadlines: the worker can end the backward beside requests when it is time.
    """

    def __init__(
        self,
        max_tokens: int,
        tpot_slo_ms: float | None = None,
        ttft_slo_ms: float | None = None,
        num_in_flight: int = 1,
        has_deadlines: bool = False,
    ) -> None:
        # What may be late is divided between what is predicted and what is cut.
        late_share = LATE_SHARE / 2 if has_deadlines else LATE_SHARE
        self.model = LatencyModel(late_share)
        self._overrun = Margin(OVERRUN_AT_START, MAX_OVERRUN, late_share, BEYOND_OVERRUN)
        self._has_deadlines = has_deadlines
        self._max_tokens = max_tokens
        self._tpot_slo_ms = tpot_slo_ms
        self._ttft_slo_ms = ttft_slo_ms
        self._num_in_flight = num_in_flight
        self._auto_multiple = AUTO_MULTIPLE
        self._left_out = self._not_run = 0
        # Iterations with inference and work to do, and those of them since one without finetuning.
        self._num_shared = self._since_alone = 0
        self._warned = False
        self._since_inference = LINGER

    def calibrate(self, samples: list[tuple[IterationWork, float]]) -> None:
        """Starts from measured iterations, see :meth:`LatencyModel.calibrate`."""
        self.model.calibrate(samples)
        alone = self.model.predict_ms(IterationWork(decode_rows=1.0))
        least = MIN_AUTO_ROOM * (alone + self._part(MIN_AUTO_TOKENS))
        self._auto_multiple = max(AUTO_MULTIPLE, least / max(alone, MIN_COST_MS))

    def target_ms(self, inference: IterationWork) -> float:
        """Longest that an iteration with this inference may take because of finetuning."""
        if not inference.has_inference and self._since_inference < LINGER:
            inference = IterationWork(decode_rows=1.0)
        if not inference.has_inference:
            if self._ttft_slo_ms is not None:
                idle = IDLE_SHARE_OF_TTFT * self._ttft_slo_ms
            else:
                idle = IDLE_MULTIPLE * self.target_ms(IterationWork(decode_rows=1.0))
            return idle / self._num_in_flight
        if self._tpot_slo_ms is not None:
            return self._tpot_slo_ms
        rows = IterationWork(max(1.0, inference.decode_rows), inference.decode_context)
        return max(MIN_AUTO_MS, self._auto_multiple * self.model.predict_ms(rows))

    def budget(
        self,
        inference: IterationWork,
        target_ms: float,
        max_tokens: int | None = None,
        has_queue: bool = False,
    ) -> Budget:
        """For an iteration that holds this inference and nothing else so far.

        Args:
            inference: of the iteration.
            target_ms: of it.
            max_tokens: that vLLM's scheduler leaves; None: as many as are allowed.
            has_queue: requests wait for a place in the batch: they get one the sooner, the less
                those before them are slowed down, so that nothing is left to finetuning.
        """
        model = self.model
        left = int(max(0, self._max_tokens - inference.prefill_tokens - inference.decode_rows))
        if max_tokens is not None:
            left = min(left, max_tokens)
        # A token is never free, whatever a few noisy iterations say.
        forward = max(model.cost_ms("forward_tokens"), MIN_COST_MS)
        backward = max(model.cost_ms("backward_tokens"), MIN_COST_MS)
        window, rows = model.cost_ms("backward_windows"), model.cost_ms("has_finetuning_rows")
        if not inference.has_inference:
            rows += model.cost_ms("has_rows")
        deadline_ms = None
        alone = model.predict_ms(inference)
        total = firm = max(0.0, target_ms / (model.margin * model.pace) - alone)
        if self._has_deadlines and inference.has_inference:
            deadline_ms = FILLED * target_ms / self._overrun.value
            total = max(firm, deadline_ms / model.pace - alone)
        if has_queue:
            total = firm = 0.0
        must_run = inference.has_inference and max(self._left_out, self._not_run) >= PATIENCE
        if must_run:
            # What the worker would find no time for runs now, whatever the time.
            self._not_run, deadline_ms = 0, None
            self._warn(inference, has_queue)
        if must_run or not inference.has_inference:
            total, firm = max(total, self._least()), max(firm, self._least())
        elif not inference.prefill_tokens and self._runs_alone():
            total = firm = 0.0
        # Backward windows may fit where a forward's fixed cost does not, and soon lack packs.
        if firm >= self._part(1):
            self._left_out = 0
        else:
            self._left_out += 1
            if self._left_out == PATIENCE:
                self._warn(inference, has_queue)
        if total < self._part(1):
            self._since_alone = 0
        step = model.cost_ms("optimizer_steps")
        return Budget(
            total, forward, backward, left, rows, window, step,
            room=max(0.0, model.knee - inference.rows),
            beyond=model.cost_ms("rows_beyond_knee"), firm=firm, deadline_ms=deadline_ms,
        )  # fmt: skip

    def _runs_alone(self) -> bool:
        """Whether it is time for an iteration with inference alone."""
        every = ALONE_EVERY_AT_FIRST if self._num_shared < FIRST else ALONE_EVERY
        self._num_shared += 1
        self._since_alone += 1
        return self._since_alone >= every

    def _warn(self, inference: IterationWork, has_queue: bool) -> None:
        """Says once that requests leave finetuning nothing."""
        if self._warned:
            return
        self._warned = True
        if has_queue:
            logger.warning(
                "finetuning waits: in the last %d iterations requests waited for a place in the "
                "batch (--max-num-seqs), for KV blocks, or for other requests' prompts",
                PATIENCE,
            )
        else:
            logger.warning(
                "finetuning waits: the last %d iterations left no time for it. One like the last "
                "takes %.0f ms without it, %.0f with its least part, and is to take at most %.0f "
                "(--finetuning-tpot-slo-ms)",
                PATIENCE,
                self.model.predict_ms(inference),
                self.model.margin * (self.model.predict_ms(inference) + self._part(1)),
                self.target_ms(inference),
            )

    def _part(self, num_tokens: int) -> float:
        """Milliseconds that so many tokens, either way, add to an iteration with others."""
        cost = self.model.cost_ms
        token = cost("forward_tokens") + cost("rows_beyond_knee")
        forward = cost("has_finetuning_rows") + num_tokens * token
        backward = cost("backward_windows") + num_tokens * cost("backward_tokens")
        return max(forward, backward, num_tokens * MIN_COST_MS)

    def _least(self) -> float:
        """Milliseconds of the smallest finetuning part that is worth it."""
        model = self.model
        forward = model.cost_ms("forward_tokens") + model.cost_ms("rows_beyond_knee")
        token = max(forward, model.cost_ms("backward_tokens"), MIN_COST_MS)
        terms = ("has_rows", "has_finetuning_rows", "backward_windows")
        fixed = sum(model.cost_ms(term) for term in terms)
        return fixed + MIN_IDLE_TOKENS * token

    @property
    def overrun(self) -> float:
        """How much longer than to its deadline an iteration must be expected to take."""
        return self._overrun.value

    def observe(
        self,
        work: IterationWork,
        duration_ms: float,
        target_ms: float | None = None,
        optional: OptionalWork | None = None,
    ) -> None:
        """Learns from an iteration.

        Args:
            work: what it held, but for what was optional.
            duration_ms: how long that took.
            target_ms: of the whole; None where there was no finetuning to do.
            optional: what came after it.
        """
        self._since_inference = 0 if work.has_inference else self._since_inference + 1
        if optional is not None and work == work.inference:
            self._since_alone = 0
        if work != work.inference or optional is not None:
            self._not_run = 0
        elif work.has_inference and target_ms is not None:
            self._not_run += 1
        self.model.observe(work, duration_ms, target_ms)
        if optional is not None and optional.duration_ms:
            self.model.observe_part(optional.work, optional.duration_ms)
            duration_ms += optional.duration_ms
            if optional.was_cut:
                self._overrun.learn(duration_ms / optional.planned_ms)
        elif work.has_finetuning:
            # What was late of this the model's margin has taken in.
            return
        if self._has_deadlines and work.decode_rows and target_ms is not None:
            late = duration_ms > FILLED * target_ms
            self._overrun.was_late(late, has_finetuning=optional is not None)
