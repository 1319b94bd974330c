"""How many finetuning tokens an iteration may hold."""

# Finetuning tokens beside inference when no latency target is given: on a 2-core CPU they make a
# decode iteration about twice as long (two streams of SmolLM2-135M: 53 ms without, 110 ms with).
TOKENS_BESIDE_INFERENCE = 32
MIN_TOKENS = 8


class TokenBudget:
    """Bounds the finetuning tokens of an iteration.

    With no inference in the iteration the bound is ``max_tokens``; it also limits how long a
    request that arrives in that moment can wait. Beside inference it is a fixed small number, or,
    with a latency target, is steered by the measured durations: additive increase, multiplicative
    decrease.

    Args:
        max_tokens: bound of any iteration.
        target_ms: per-iteration latency target while inference is present, or None.
    """

    def __init__(self, max_tokens: int, target_ms: float | None) -> None:
        self._max_tokens = max_tokens
        self._target_ms = target_ms
        self._beside: float = min(TOKENS_BESIDE_INFERENCE, max_tokens)

    def tokens(self, inference_tokens: int) -> int:
        """Finetuning tokens for an iteration that holds this many inference tokens.

        A forward token counts as one, and so does a token's whole backward. Prompt tokens count
        against the bound of the idle case, so that a long prefill is not made longer still.
        """
        if inference_tokens == 0:
            return self._max_tokens
        return max(0, min(int(self._beside), self._max_tokens - inference_tokens))

    def observe(self, inference_tokens: int, finetuning_tokens: int, duration_ms: float) -> None:
        """Learns from an iteration."""
        if self._target_ms is None or inference_tokens == 0 or finetuning_tokens == 0:
            return
        if duration_ms > self._target_ms:
            self._beside = max(MIN_TOKENS, self._beside * 0.8)
        elif finetuning_tokens >= 0.8 * self._beside:
            self._beside = min(self._max_tokens, self._beside + 1)
