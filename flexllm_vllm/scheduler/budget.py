"""How much finetuning an iteration may hold: what fits into its latency target."""

from dataclasses import dataclass, replace

from flexllm_vllm.scheduler.latency_model import IterationWork, LatencyModel

# Without --finetuning-tpot-slo-ms: an iteration with inference may take so many times what it would
# take without finetuning.
AUTO_MULTIPLE = 2.5
# Without --finetuning-ttft-slo-ms: an iteration without inference may take so many times the target
# of one with it. A request that arrives during it waits for its end.
IDLE_MULTIPLE = 4.0
# Of the TTFT target, what may be spent waiting for the iteration in which the request arrives.
IDLE_SHARE_OF_TTFT = 0.5
# Finetuning tokens beside inference until enough such iterations were measured.
TOKENS_AT_START = 16
MIXED_AT_START = 8


@dataclass(frozen=True)
class Budget:
    """What the finetuning part of an iteration may cost, and what its parts cost.

    Attributes:
        total: of the iteration.
        forward: of a token's forward through all layers.
        backward: of a token's backward through all layers.
        max_tokens: bound of the forward tokens, whatever they cost.
        shared: forward and backward each get a part. Beside decode rows, which ride almost free
            on a forward window, both belong into an iteration; alone, large windows are faster.
    """

    total: float
    forward: float
    backward: float
    max_tokens: int
    shared: bool = True

    @classmethod
    def of_tokens(cls, num_tokens: int) -> "Budget":
        """A number of tokens; a token's forward counts as one, and so does its backward."""
        return cls(num_tokens, 1.0, 1.0, num_tokens)


class LatencyBudget:
    """Turns latency targets into the budget of each iteration.

    Args:
        max_tokens: finetuning tokens of any iteration.
        tpot_slo_ms: target of an iteration that holds inference; None: :data:`AUTO_MULTIPLE` times
            what its decode rows take alone.
        ttft_slo_ms: bounds iterations that hold none; None: :data:`IDLE_MULTIPLE` times the target
            beside one decode row.
    """

    def __init__(
        self, max_tokens: int, tpot_slo_ms: float | None = None, ttft_slo_ms: float | None = None
    ) -> None:
        self.model = LatencyModel()
        self._max_tokens = max_tokens
        self._tpot_slo_ms = tpot_slo_ms
        self._ttft_slo_ms = ttft_slo_ms
        self._num_mixed = 0
        self._num_decoding = 0

    def target_ms(self, inference: IterationWork) -> float | None:
        """Longest that an iteration with this inference may take because of finetuning.

        None while nothing is known of this machine.
        """
        if not inference.has_inference:
            if self._ttft_slo_ms is not None:
                return IDLE_SHARE_OF_TTFT * self._ttft_slo_ms
            busy = self.target_ms(IterationWork(decode_rows=1.0))
            return None if busy is None else IDLE_MULTIPLE * busy
        if self._tpot_slo_ms is not None:
            return self._tpot_slo_ms
        if self._num_decoding < MIXED_AT_START:
            return None
        rows = replace(inference, prefill_tokens=0.0, decode_rows=max(1.0, inference.decode_rows))
        return AUTO_MULTIPLE * self.model.predict_ms(rows)

    def budget(self, inference: IterationWork) -> Budget:
        """For an iteration that holds this inference and nothing else so far."""
        left = int(max(0, self._max_tokens - inference.prefill_tokens - inference.decode_rows))
        target = self.target_ms(inference)
        if inference.has_inference and (target is None or self._num_mixed < MIXED_AT_START):
            return Budget.of_tokens(min(left, TOKENS_AT_START))
        if target is None:
            return replace(Budget.of_tokens(left), shared=inference.has_inference)
        model = self.model
        fixed = model.predict_ms(replace(inference, has_finetuning_rows=1.0))
        forward = max(model.cost_ms("forward_tokens"), 1e-3)
        backward = max(model.cost_ms("backward_tokens"), 1e-3)
        total = min(target / model.margin - fixed, left * max(forward, backward))
        return Budget(max(0.0, total), forward, backward, left, inference.has_inference)

    def observe(self, work: IterationWork, duration_ms: float) -> None:
        """Learns from an iteration."""
        self.model.observe(work, duration_ms)
        self._num_decoding += work.decode_rows > 0
        self._num_mixed += work.has_inference and work.has_finetuning
