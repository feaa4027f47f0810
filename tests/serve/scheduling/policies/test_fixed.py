import pytest

from pcae_serve.errors import StartError
from pcae_serve.scheduling.policies.fixed import Fixed
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import TIER_TABLE, ids, load, view, waiting


@pytest.mark.parametrize("budget_s", [0.11, 9.0])
@pytest.mark.parametrize("rate", [0.0, 1000.0])
def test_neither_budget_nor_load_moves_it(budget_s: float, rate: float) -> None:
    run = Fixed(TIER_TABLE, "balanced").choose(view(waiting(budget_s), arrivals=load(rate)))
    assert run.tier == 1


@pytest.mark.parametrize(("allowed", "tier"), [((0, 1, 2), 1), ((0, 2), 2), ((2,), 2), ((0,), 0)])
def test_where_it_is_not_allowed_the_next_more_accurate_else_the_most_accurate(
    allowed: tuple[int, ...], tier: int
) -> None:
    assert Fixed(TIER_TABLE, "balanced").choose(view(waiting(9.0, tiers=allowed))).tier == tier


def test_the_batch_stops_where_its_head_would_be_late() -> None:
    requests = waiting(0.125, *[9.0] * 9)  # 0.09 + 3 * 0.01 = 0.12
    assert ids(Fixed(TIER_TABLE, "fast").choose(view(requests))) == [0, 1, 2]


def test_the_batch_stops_at_what_the_machine_takes() -> None:
    assert ids(Fixed(TIER_TABLE, "fast").choose(view(waiting(*[9.0] * 9), most=4))) == [0, 1, 2, 3]


def test_a_batch_is_no_larger_than_worth_filling() -> None:
    run = Fixed(TIER_TABLE, "fast").choose(view(waiting(*[9.0] * 40)))
    useful = view(waiting(9.0)).forecast.useful_batch(0)
    assert useful < 32
    assert len(run.requests) == useful


def test_a_head_that_is_too_late_runs_alone_and_is_not_given_up() -> None:
    run = Fixed(TIER_TABLE, "full").choose(view(waiting(0.2, 9.0)))
    assert ids(run) == [0]
    assert not run.dropped


def test_company_of_a_head_pinned_elsewhere_keeps_to_the_fixed_tier() -> None:
    pinned, free = Request(0, 0.0, 7.0, (2,)), Request(1, 0.0, 8.0, (0, 1, 2))
    also_pinned = Request(2, 0.0, 9.0, (1, 2))  # fast is not allowed, and balanced is nearer
    same = Request(3, 0.0, 9.0, (2,))
    run = Fixed(TIER_TABLE, "fast").choose(view([pinned, free, also_pinned, same]))
    assert run.tier == 2
    assert ids(run) == [0, 3]


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(StartError, match="the tiers are fast, balanced, full"):
        Fixed(TIER_TABLE, "slow")
