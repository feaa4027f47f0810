"""What pace does if waiting has a price; one image takes 0.1, 0.2 and 0.4 s on the three tiers."""

import json
from pathlib import Path

import numpy as np
import pytest

from pcae_serve.loadtest.simulator import End, draw, simulate
from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.latency import Seconds
from pcae_serve.scheduling.policies.base import Run
from pcae_serve.scheduling.policies.pace import Pace
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable
from tests.support.random_views import random_view
from tests.support.scheduler_views import (
    ALL,
    LINES,
    MOST,
    TIER_TABLE,
    ids,
    linear,
    load,
    view,
    waiting,
)

#: Of `pace` before waiting had a price (commit b001ff6): [tier, first request, requests] by seed.
RECORDED = Path(__file__).with_name("decisions_without_price.json")
#: The three tiers with intervals: only the last is better than the first by more than the margin.
CLOSE = TierTable(TIER_TABLE.names, (0.80, 0.81, 0.82), ((0.015,) * 3,) * 3)


def choose(
    requests: list[Request],
    price: float,
    *,
    tier_table: TierTable = TIER_TABLE,
    arrivals: Arrivals | None = None,
    devices: int = 1,
) -> Run:
    return Pace(tier_table, price).choose(view(requests, arrivals=arrivals, devices=devices))


def test_without_a_price_every_decision_is_as_recorded() -> None:
    for seed, (tier, first, size) in enumerate(json.loads(RECORDED.read_text())):
        tier_table, situation = random_view(seed)
        run = Pace(tier_table, 0.0).choose(situation)
        assert (run.tier, run.requests[0].id, len(run.requests)) == (tier, first, size), seed


# alone: 5 points for 100 ms on the middle tier, 5 more for another 200 ms on the last one
@pytest.mark.parametrize(("price", "tier"), [(0, 2), (2.4, 2), (2.6, 1), (4.9, 1), (5.1, 0)])
def test_a_better_tier_is_worth_its_price(price: float, tier: int) -> None:
    assert choose(waiting(10.0), price).tier == tier


@pytest.mark.parametrize(("queued", "tier"), [(1, 2), (10, 1), (30, 0)])
def test_everyone_who_waits_counts(queued: int, tier: int) -> None:
    # the batch holds the first one only: the others allow just the cheapest tier
    others = [Request(i, 0.0, 60.0, (0,)) for i in range(1, queued)]
    assert choose([Request(0, 0.0, 50.0, ALL), *others], 0.4).tier == tier


@pytest.mark.parametrize(("rate", "tier"), [(0.1, 2), (5.0, 1), (60.0, 0)])
def test_requests_that_will_arrive_count(rate: float, tier: int) -> None:
    arrivals = load(rate, budgets_s=(5.0,))
    assert choose(waiting(5.0), 1.0, arrivals=arrivals).tier == tier


@pytest.mark.parametrize(("devices", "tier"), [(1, 1), (4, 2)])
def test_devices_share_the_wait(devices: int, tier: int) -> None:
    others = [Request(i, 0.0, 60.0, (0,)) for i in range(1, 10)]
    assert choose([Request(0, 0.0, 50.0, ALL), *others], 0.4, devices=devices).tier == tier


def test_requests_without_a_choice_neither_gain_nor_delay() -> None:
    pinned = [Request(i, 0.0, 10.0, (2,)) for i in range(1, 4)]
    head = Request(0, 0.0, 9.0, (0, 2))
    alone, joined = choose([head], 1.0), choose([head, *pinned], 1.0)
    assert (alone.tier, ids(alone)) == (2, [0])
    assert (joined.tier, ids(joined)) == (2, [0, 1, 2, 3])


def test_of_equally_accurate_tiers_the_faster_one_runs_at_any_price() -> None:
    # full is better than fast, but not than balanced
    assert choose(waiting(10.0), 1e-9, tier_table=CLOSE).tier == 1
    assert choose(waiting(10.0), 0.0, tier_table=CLOSE).tier == 2
    assert choose(waiting(10.0, tiers=(0, 1)), 1e-9, tier_table=CLOSE).tier == 0
    assert choose(waiting(10.0, tiers=(1, 2)), 1e-9, tier_table=CLOSE).tier == 1
    assert choose(waiting(10.0, tiers=(2,)), 1e-9, tier_table=CLOSE).tier == 2


def test_a_tier_that_the_load_does_not_sustain_counts_with_what_can_be_mixed() -> None:
    """One by one, 8 per second fit on the cheapest tier, 4 on the middle one, 2 on the last."""
    lines = ((0.0, 0.125), (0.0, 0.25), (0.0, 0.5))
    arrivals = load(3.9, budgets_s=(60.0,))
    tier_table = TierTable(TIER_TABLE.names, (0.5, 0.8, 0.82))

    def tier(price: float, *budgets_s: float) -> int:
        situation = view(waiting(*budgets_s), latency=linear(*lines), arrivals=arrivals)
        return Pace(tier_table, price).choose(situation).tier

    # on the last tier two fifths could run, with 0.32 of its gain; the middle one sustains all
    assert tier(1e-9, 60.0, 60.0) == 1
    assert tier(0.0, 60.0, 60.0) == 2
    assert tier(1e-9, 60.0) == 2  # no other request waits: once is not for ever


def test_a_higher_price_never_chooses_a_slower_tier() -> None:
    """For requests of one kind, in 300 random situations."""
    prices = (1e-6, 0.03, 0.1, 0.3, 1.0, 3.0, 30.0)
    changed = 0
    for seed in range(300):
        tier_table, situation = random_view(seed)
        every = tuple(range(len(tier_table.names)))
        for request in list(situation.queue):
            situation.queue.remove(request.id)
            situation.queue.add(Request(request.id, request.arrival_s, request.deadline_s, every))
        tiers = [Pace(tier_table, price).choose(situation).tier for price in prices]
        assert tiers == sorted(tiers, reverse=True), seed
        changed += tiers[0] != tiers[-1]
    assert changed > 30


def test_a_higher_price_gives_shorter_response_times_and_no_fewer_answers() -> None:
    times_s = np.cumsum(np.random.default_rng(1).exponential(1 / 8, 600))
    points = [{b: Seconds(o + b * i, 1.1 * (o + b * i)) for b in (1, MOST)} for o, i in LINES]
    response_s, in_time = [], []
    for price in (0.0, 0.1, 1.0, 5.0):
        scheduler = Scheduler(Pace(TIER_TABLE, price), linear(*LINES, tail=1.1))
        outcome = simulate(times_s, np.full(600, 2.0), scheduler, draw(points, MOST, 2), ALL)
        answered = outcome.end == End.IN_TIME
        response_s.append(float((outcome.end_s - outcome.arrival_s)[answered].mean()))
        in_time.append(int(answered.sum()))
    assert response_s == sorted(response_s, reverse=True)
    assert response_s[-1] < response_s[0] / 2
    assert min(in_time) >= in_time[0] - 3


def test_the_batch_holds_the_most_urgent_requests() -> None:
    assert ids(choose(waiting(2.0, 3.0, 4.0), 0.1)) == [0, 1, 2]
