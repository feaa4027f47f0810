import pytest

from pcae_serve.scheduling.policies.infaas import Infaas
from tests.support.scheduler_views import ids, load, view, waiting


@pytest.mark.parametrize(("budget_s", "tier"), [(0.41, 2), (0.39, 1), (0.19, 0)])
def test_the_tier_closest_below_the_slack(budget_s: float, tier: int) -> None:
    assert Infaas().choose(view(waiting(budget_s))).tier == tier


def test_its_whole_batch_must_be_within_the_slack() -> None:
    assert Infaas().choose(view(waiting(0.45, 0.45))).tier == 2  # 0.44 s
    assert Infaas().choose(view(waiting(0.45, 0.45, 0.45))).tier == 1  # 0.48 and 0.24 s


def test_tiers_that_the_head_does_not_allow_are_filtered() -> None:
    assert Infaas().choose(view(waiting(9.0, tiers=(0, 1)))).tier == 1
    assert Infaas().choose(view(waiting(0.01, tiers=(1, 2)))).tier == 1


@pytest.mark.parametrize(("rate", "tier"), [(0.0, 2), (14.0, 2), (20.0, 1), (40.0, 0), (999.0, 0)])
def test_load_above_nine_tenths_of_the_capacity_takes_the_next_cheaper(
    rate: float, tier: int
) -> None:
    """32 images take 0.41, 0.82 and 1.64 s: at nine tenths 17.6, 35 and 70 a second."""
    assert Infaas().choose(view(waiting(9.0), arrivals=load(rate))).tier == tier


def test_devices_share_the_load() -> None:
    assert Infaas().choose(view(waiting(9.0), arrivals=load(28.0), devices=2)).tier == 2


def test_a_larger_batch_is_tried_before_a_cheaper_tier() -> None:
    requests = waiting(*[9.0] * 40)
    useful = view(requests).forecast.useful_batch(2)
    calm = Infaas().choose(view(requests, arrivals=load(10.0)))
    busy = Infaas().choose(view(requests, arrivals=load(17.0)))  # 22 at a time: 16.0 a second
    assert (calm.tier, len(calm.requests)) == (2, useful)
    assert (busy.tier, len(busy.requests)) == (2, 32)


def test_only_batches_that_a_budget_holds_count_as_capacity() -> None:
    """In 0.5 s the best tier does three images, at nine tenths 5.6 a second."""
    assert Infaas().choose(view(waiting(0.5), arrivals=load(5.0))).tier == 2
    assert Infaas().choose(view(waiting(0.5), arrivals=load(6.0))).tier == 1


def test_what_cannot_be_met_runs_alone_on_the_fastest_allowed_tier() -> None:
    run = Infaas().choose(view(waiting(0.01, 9.0)))
    assert run.tier == 0
    assert ids(run) == [0]
