import pytest

from pcae_serve.scheduling.policies.conservative import Conservative
from tests.support.scheduler_views import ids, load, view, waiting


@pytest.mark.parametrize(("budget_s", "tier"), [(0.81, 2), (0.79, 1), (0.39, 0)])
def test_a_batch_takes_half_the_budget_at_most(budget_s: float, tier: int) -> None:
    assert Conservative().choose(view(waiting(budget_s))).tier == tier


def test_half_of_the_whole_budget_counts_however_much_of_it_is_left() -> None:
    assert Conservative().choose(view(waiting(1.0), now_s=0.55)).tier == 2
    assert Conservative().choose(view(waiting(1.0), now_s=0.65)).tier == 1


@pytest.mark.parametrize(("rate", "tier"), [(0.0, 2), (2.4, 2), (2.6, 1), (5.1, 0), (99.0, 0)])
def test_the_tier_keeps_up_with_the_load(rate: float, tier: int) -> None:
    """One image a batch: 2.5, 5 and 10 a second."""
    assert Conservative().choose(view(waiting(9.0), arrivals=load(rate))).tier == tier


def test_devices_share_the_load() -> None:
    run = Conservative().choose(view(waiting(9.0), arrivals=load(4.8), devices=2))
    assert run.tier == 2


def test_a_larger_batch_keeps_up_with_more() -> None:
    run = Conservative().choose(view(waiting(*[9.0] * 8), arrivals=load(11.0)))  # 8 in 0.68 s
    assert run.tier == 2
    assert len(run.requests) == 8


def test_where_no_tier_suits_the_fastest_takes_those_that_fit() -> None:
    run = Conservative().choose(view(waiting(*[0.125] * 9), arrivals=load(1000.0)))
    assert run.tier == 0
    assert ids(run) == [0, 1, 2]
