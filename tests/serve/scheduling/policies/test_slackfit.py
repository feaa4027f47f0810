"""SlackFit; one image takes 0.1, 0.2 and 0.4 s, a further one of the batch a tenth of that."""

import pytest

from pcae_serve.scheduling.policies.slackfit import SlackFit
from tests.support.scheduler_views import LINES, ids, linear, load, view, waiting

CROWD = [9.0] * 40


@pytest.mark.parametrize("slack_s", [0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5])
def test_the_batch_chosen_is_in_time_and_no_larger_one_is_in_its_bucket(slack_s: float) -> None:
    now = view(waiting(slack_s, *CROWD))
    run = SlackFit().choose(now)
    forecast, batch = now.forecast, len(run.requests)
    took_s = forecast.p99(run.tier, batch)
    width_s = (forecast.p99(2, forecast.useful_batch(2)) - 0.1) / 31
    assert took_s <= slack_s
    assert took_s > slack_s - 2 * width_s or batch == forecast.useful_batch(2)
    better = [
        (tier, larger)
        for tier in (0, 1, 2)
        for larger in range(batch + 1, forecast.useful_batch(tier) + 1)
        if slack_s - width_s >= forecast.p99(tier, larger) > took_s
    ]
    assert not better


@pytest.mark.parametrize(
    ("budgets_s", "now_s", "tier", "size"),
    [
        pytest.param([9.0], 0.0, 2, 1, id="ample-slack:best-tier"),
        # 0.28 s, the bucket below 0.30; the next tier would serve 5
        pytest.param([2.0, *CROWD], 1.7, 0, 19, id="little-slack:throughput"),
        pytest.param([0.05, *CROWD], 0.0, 0, 1, id="less-than-any-bucket:alone-on-the-fastest"),
    ],
)
def test_choice(budgets_s: list[float], now_s: float, tier: int, size: int) -> None:
    run = SlackFit().choose(view(waiting(*budgets_s), now_s=now_s))
    assert (run.tier, ids(run)) == (tier, list(range(size)))


def test_of_equal_batches_in_a_bucket_the_most_accurate_tier_is_chosen() -> None:
    latency = linear((0.100, 0.0), (0.101, 0.0), (0.600, 0.0))
    run = SlackFit().choose(view(waiting(0.2), latency=latency))
    assert run.tier == 1


def test_buckets_depend_on_the_allowed_tiers() -> None:
    policy = SlackFit()
    allowed = [(0, 1, 2), (0, 1), (0, 1, 2)]
    assert [policy.choose(view(waiting(0.7, tiers=tiers))).tier for tiers in allowed] == [2, 1, 2]


def test_buckets_are_recomputed_if_latencies_change_by_more_than_5_percent() -> None:
    policy, batches = SlackFit(), []
    for factor in (1.0, 1.04, 1.06):
        latency = linear(*((o * factor, i * factor) for o, i in LINES))
        batches.append(len(policy.choose(view(waiting(0.29, *CROWD), latency=latency)).requests))
    assert batches[0] == batches[1] > batches[2]


def test_the_arrival_rate_is_ignored() -> None:
    assert SlackFit().choose(view(waiting(9.0), arrivals=load(1000.0))).tier == 2
