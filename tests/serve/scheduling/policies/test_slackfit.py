import pytest

from pcae_serve.scheduling.policies.slackfit import SlackFit
from tests.support.scheduler_views import LINES, ids, linear, load, view, waiting

CROWD = [9.0] * 40


@pytest.mark.parametrize("slack_s", [0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5])
def test_the_batch_chosen_is_in_time_and_no_larger_one_lies_in_its_bucket(slack_s: float) -> None:
    now = view(waiting(slack_s, *CROWD))
    run = SlackFit().choose(now)
    forecast, batch = now.forecast, len(run.requests)
    took_s = forecast.p99(run.tier, batch)
    width_s = (forecast.p99(2, forecast.useful_batch(2)) - 0.1) / 31
    assert took_s <= slack_s
    assert took_s > slack_s - 2 * width_s or batch == forecast.useful_batch(2)
    beaten = [
        (tier, larger)
        for tier in (0, 1, 2)
        for larger in range(batch + 1, forecast.useful_batch(tier) + 1)
        if slack_s - width_s >= forecast.p99(tier, larger) > took_s
    ]
    assert not beaten


def test_ample_slack_gives_the_best_tier() -> None:
    run = SlackFit().choose(view(waiting(9.0)))
    assert run.tier == 2


def test_slack_that_the_queue_has_eaten_gives_throughput() -> None:
    loose = SlackFit().choose(view(waiting(2.0, *CROWD)))
    tight = SlackFit().choose(view(waiting(2.0, *CROWD), now_s=1.7))
    assert loose.tier == 2
    assert tight.tier == 0
    assert len(tight.requests) == 19  # 0.28 s, the bucket below 0.30; the next tier takes 5


def test_among_equal_batches_the_most_accurate_tier_wins() -> None:
    latency = linear((0.100, 0.0), (0.101, 0.0), (0.600, 0.0))
    run = SlackFit().choose(view(waiting(0.2), latency=latency))
    assert run.tier == 1  # 0.100 and 0.101 s: the same bucket but for the very first


def test_less_slack_than_any_bucket_runs_the_head_on_its_fastest_tier() -> None:
    run = SlackFit().choose(view(waiting(0.05, *CROWD)))
    assert run.tier == 0
    assert ids(run) == [0]


def test_a_head_that_allows_less_has_buckets_of_its_own() -> None:
    policy = SlackFit()
    assert policy.choose(view(waiting(0.7))).tier == 2
    assert policy.choose(view(waiting(0.7, tiers=(0, 1)))).tier == 1
    assert policy.choose(view(waiting(0.7))).tier == 2


def test_buckets_follow_a_machine_that_slows_down() -> None:
    policy = SlackFit()
    slowed = linear((0.18, 0.02), (0.36, 0.04), (0.72, 0.08))
    assert policy.choose(view(waiting(0.8))).tier == 2
    assert policy.choose(view(waiting(0.8), latency=slowed)).tier == 1
    assert policy.choose(view(waiting(0.8))).tier == 2


def test_buckets_are_not_drawn_anew_for_a_change_of_a_few_percent() -> None:
    policy = SlackFit()
    batches = []
    for times in (1.0, 1.04, 1.06):
        latency = linear(*((o * times, i * times) for o, i in LINES))
        batches.append(len(policy.choose(view(waiting(0.29, *CROWD), latency=latency)).requests))
    assert batches[0] == batches[1] > batches[2]


def test_load_is_not_seen() -> None:
    assert SlackFit().choose(view(waiting(9.0), arrivals=load(1000.0))).tier == 2
