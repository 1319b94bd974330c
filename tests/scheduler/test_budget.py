from flexllm_vllm.scheduler.budget import TOKENS_BESIDE_INFERENCE, TokenBudget


def test_an_idle_engine_takes_the_maximum_and_a_busy_one_little() -> None:
    budget = TokenBudget(256, None)
    assert budget.tokens(0) == 256
    assert budget.tokens(3) == TOKENS_BESIDE_INFERENCE
    assert budget.tokens(240) == 16
    assert budget.tokens(1000) == 0


def test_a_latency_target_steers_the_tokens() -> None:
    budget = TokenBudget(512, 100.0)

    def duration(tokens: int) -> float:
        return 40.0 + tokens

    for _ in range(400):
        tokens = budget.tokens(2)
        budget.observe(2, tokens, duration(tokens))
    assert 40 <= budget.tokens(2) <= 61
