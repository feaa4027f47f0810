import pytest

from pcae_serve.scheduling.policies.base import SchedulerView
from pcae_serve.scheduling.policies.model_switching import PATIENCE, ModelSwitching
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import TIER_TABLE, ids, load, view, waiting

CALM, NEARLY, BUSY = 5.0, 6.0, 7.0  # the best tier keeps up with 6.25 a second


def at(rate: float, *budgets_s: float, devices: int = 1) -> SchedulerView:
    arrivals = load(rate, budgets_s=budgets_s or (1.0,))
    return view(waiting(1.0), arrivals=arrivals, devices=devices)


def tier_at(now: SchedulerView) -> int:
    return ModelSwitching(TIER_TABLE).choose(now).tier


@pytest.mark.parametrize(
    ("rate", "tier"), [(0.0, 2), (6.0, 2), (7.0, 1), (31.0, 1), (33.0, 0), (70.0, 0), (999.0, 0)]
)
def test_the_load_names_the_tier(rate: float, tier: int) -> None:
    """A budget of 1 s holds two batches of 0.48 s or 0.50 s: of 3 or 16, 6.25 or 32 a second."""
    assert tier_at(at(rate)) == tier


def test_devices_share_the_load() -> None:
    assert tier_at(at(12.0, devices=2)) == 2
    assert tier_at(at(14.0, devices=2)) == 1


def test_half_of_the_answers_late_is_worse_than_all_of_them_less_accurate() -> None:
    assert tier_at(at(6.0, 1.0, 0.5)) == 1


def test_few_tight_budgets_do_not_outweigh_the_accuracy_of_all_others() -> None:
    assert tier_at(at(6.0, 0.5, *[1.0] * 31)) == 2  # 0.90 of 31 in 32, against 0.85 of all


def test_down_at_once() -> None:
    policy = ModelSwitching(TIER_TABLE)
    assert [policy.choose(at(rate)).tier for rate in (CALM, BUSY, 33.0)] == [2, 1, 0]


def test_up_only_after_some_calm_decisions() -> None:
    policy = ModelSwitching(TIER_TABLE)
    tiers = [policy.choose(at(rate)).tier for rate in [BUSY] + [CALM] * PATIENCE]
    assert tiers == [1] * PATIENCE + [2]


def test_a_burst_in_between_starts_the_patience_anew() -> None:
    policy = ModelSwitching(TIER_TABLE)
    rates = [BUSY] + [CALM] * (PATIENCE - 1) + [BUSY] + [CALM] * (PATIENCE - 1)
    assert {policy.choose(at(rate)).tier for rate in rates} == {1}


def test_not_up_where_the_load_is_just_below_the_threshold() -> None:
    policy = ModelSwitching(TIER_TABLE)
    assert {policy.choose(at(rate)).tier for rate in [BUSY] + [NEARLY] * 3 * PATIENCE} == {1}


def test_a_request_that_does_not_allow_the_tier_gets_the_nearest() -> None:
    now = view([Request(0, 0.0, 1.0, (1, 2))], arrivals=load(33.0))
    assert tier_at(now) == 1


def test_the_batch_stops_where_its_head_would_be_late() -> None:
    run = ModelSwitching(TIER_TABLE).choose(view(waiting(0.45, *[9.0] * 9)))
    assert run.tier == 2
    assert ids(run) == [0, 1]  # 0.44 s
