"""The scheduler against stock vLLM's and a worker that checks, on configurations drawn at random.

Everything but the model is real: vLLM's scheduler and KV cache manager, the planner, the latency
model, the jobs.
"""

from hypothesis import HealthCheck, given, settings
from lockstep import Pair
from random_cases import Case, SomeJob, cases

from flexllm_vllm.plan import AdapterLayout

# The same examples in every run; shrinking one that fails may take minutes.
PROPERTY = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@PROPERTY
@given(cases())
def test_inference_equals_stock_and_every_job_ends_with_each_example_trained_once_an_epoch(
    case: Case,
) -> None:
    Pair(case).run()


@PROPERTY
@given(cases())
def test_the_same_where_iterations_are_scheduled_ahead_of_results(case: Case) -> None:
    Pair(case, ahead=1).run()


@PROPERTY
@given(cases())
def test_the_same_where_the_backward_ends_at_a_deadline(case: Case) -> None:
    Pair(case, deadlines=True).run()


@PROPERTY
@given(cases(prefix_caching=True))
def test_no_row_reads_what_another_wrote_beside_the_prefix_cache(case: Case) -> None:
    Pair(case, alone=True).run()


def test_two_packs_do_not_take_each_others_blocks_for_ever() -> None:
    """73 and 33 tokens into 80: the first gets 28 at a time, the second is given up for it and
    admitted again within the same plan, and takes the blocks back."""
    first, second = (
        SomeJob(
            at=0, lengths=(length,), batch_size=1, n_epochs=1, weight=1.0, unmasked_from=1,
            cancel=None,
        )
        for length in (73, 33)
    )  # fmt: skip
    layout = AdapterLayout(8, 29, lowest_layer=0, score_tokens_per_page=64)
    case = Case(
        blocks=20, block_size=4, max_num_seqs=4, max_tokens=64, finetuning_tokens=64, max_rows=4,
        layout=layout, tpot_slo_ms=None, requests=(), jobs=(first, second), budgets=(30.0,),
    )  # fmt: skip
    Pair(case).run()
