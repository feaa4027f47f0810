"""INFaaS; 32 images take 0.41, 0.82 and 1.64 s."""

import pytest

from pcae_serve.scheduling.policies.infaas import Infaas
from tests.support.scheduler_views import ALL, ids, load, view, waiting


@pytest.mark.parametrize(
    ("budgets_s", "allowed", "tier"),
    [
        ([0.41], ALL, 2),
        ([0.39], ALL, 1),
        ([0.19], ALL, 0),
        ([0.45] * 2, ALL, 2),  # 0.44 s
        ([0.45] * 3, ALL, 1),  # 0.48 and 0.24 s
        ([9.0], (0, 1), 1),
        ([0.01], (1, 2), 1),
    ],
)
def test_the_slowest_tier_that_serves_the_queue_within_the_slack(
    budgets_s: list[float], allowed: tuple[int, ...], tier: int
) -> None:
    assert Infaas().choose(view(waiting(*budgets_s, tiers=allowed))).tier == tier


@pytest.mark.parametrize(
    ("budget_s", "rate", "devices", "tier"),
    [
        # at 90 % utilisation 17.6, 35 and 70 per second
        (9.0, 0.0, 1, 2),
        (9.0, 14.0, 1, 2),
        (9.0, 20.0, 1, 1),
        (9.0, 40.0, 1, 0),
        (9.0, 999.0, 1, 0),
        (9.0, 28.0, 2, 2),  # devices share the load
        # a budget of 0.5 s allows three images on the best tier: 5.6 per second
        (0.5, 5.0, 1, 2),
        (0.5, 6.0, 1, 1),
    ],
)
def test_load_above_the_capacity_lowers_the_tier(
    budget_s: float, rate: float, devices: int, tier: int
) -> None:
    now = view(waiting(budget_s), arrivals=load(rate), devices=devices)
    assert Infaas().choose(now).tier == tier


def test_a_larger_batch_is_tried_before_a_cheaper_tier() -> None:
    requests = waiting(*[9.0] * 40)
    useful = view(requests).forecast.useful_batch(2)
    calm = Infaas().choose(view(requests, arrivals=load(10.0)))
    busy = Infaas().choose(view(requests, arrivals=load(17.0)))  # 22 at a time: 16.0 per second
    assert (calm.tier, len(calm.requests)) == (2, useful)
    assert (busy.tier, len(busy.requests)) == (2, 32)


def test_a_late_request_runs_alone_on_the_fastest_tier() -> None:
    run = Infaas().choose(view(waiting(0.01, 9.0)))
    assert (run.tier, ids(run)) == (0, [0])
