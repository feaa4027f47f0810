"""Pace, our own policy, by what it chooses. 0.1, 0.2 and 0.4 s for one image on the three tiers.

A further image of a batch takes a tenth more; the tiers are right in 80, 85 and 90 % of cases.
"""

import numpy as np
import pytest

from pcae_serve.loadtest.simulator import End, Outcome, draw, simulate
from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.latency import Seconds
from pcae_serve.scheduling.policies.pace import Pace
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable
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

#: The same tiers, with more to be gained by the better ones.
STEEP = TierTable(TIER_TABLE.names, (0.20, 0.50, 0.90))


def bursts(size: int, every_s: float, budget_s: float) -> Arrivals:
    """So many at once, time and again; the last burst was as long ago."""
    arrivals = Arrivals()
    for i in range(60):
        for _ in range(size):
            arrivals.observe((i - 60) * every_s, budget_s)
    return arrivals


def choice(
    requests: list[Request],
    arrivals: Arrivals | None = None,
    *,
    tier_table: TierTable = TIER_TABLE,
    devices: int = 1,
) -> tuple[int, list[int]]:
    """The tier, and who runs."""
    run = Pace(tier_table).choose(view(requests, arrivals=arrivals, devices=devices))
    return run.tier, ids(run)


@pytest.mark.parametrize(
    ("budget_s", "tier"), [(10.0, 2), (0.41, 2), (0.39, 1), (0.21, 1), (0.19, 0), (0.11, 0)]
)
def test_an_idle_machine_gives_the_best_tier_that_fits(budget_s: float, tier: int) -> None:
    assert choice(waiting(budget_s)) == (tier, [0])


def test_few_arrivals_do_not_lower_the_tier_of_a_loose_budget() -> None:
    assert choice(waiting(2.0), load(1.0, budgets_s=(2.0,))) == (2, [0])


@pytest.mark.parametrize(("count", "tier"), [(5, 2), (10, 2), (20, 1), (40, 0)])
def test_the_more_is_due_the_cheaper_the_tier(count: int, tier: int) -> None:
    assert choice(waiting(*[1.0] * count))[0] == tier


@pytest.mark.parametrize(("size", "tier"), [(1, 2), (2, 1), (4, 0)])
def test_the_more_is_to_come_the_cheaper_the_tier(size: int, tier: int) -> None:
    assert choice(waiting(1.0), bursts(size, 1.0, 0.5)) == (tier, [0])


def test_overload_takes_the_cheapest_tier_in_a_large_batch() -> None:
    tier, run = choice(waiting(*[1.0] * 60), load(60.0))
    assert tier == 0
    assert len(run) > 16


def play(rate: float, devices: int = 1) -> Outcome:
    """600 requests with a second each, as they come at random, on the virtual clock."""
    generator = np.random.default_rng(1)
    times_s = np.cumsum(generator.exponential(1 / rate, 600))
    points = [{b: Seconds(o + b * i, 1.1 * (o + b * i)) for b in (1, MOST)} for o, i in LINES]
    machine = Scheduler(Pace(TIER_TABLE), linear(*LINES, tail=1.1), devices=devices)
    return simulate(times_s, np.full(600, 1.0), machine, draw(points, MOST, 2), ALL)


def test_from_light_load_to_overload() -> None:
    light, busy, over = play(2.0), play(20.0), play(200.0)
    tiers = [float(outcome.tier[outcome.tier >= 0].mean()) for outcome in (light, busy, over)]
    in_time = [float((outcome.end == End.IN_TIME).mean()) for outcome in (light, busy, over)]
    assert tiers[0] > 1.9
    assert 0.2 < tiers[1] < 1.8
    assert tiers[2] < 0.2
    assert min(in_time[:2]) > 0.98
    # at 1 s of budget a batch may hold 22, which take 0.31 s: 71 a second at most
    assert np.mean(over.batches) > 16
    assert (over.end == End.IN_TIME).sum() / over.span_s > 50


@pytest.mark.parametrize(
    ("head_s", "behind", "behind_s", "first", "size"),
    [
        (0.15, 5, 1.0, 0, 6),  # six are all that the head has time for
        (0.15, 30, 1.0, 0, 6),
        (0.15, 40, 1.0, 1, 32),
        (0.15, 60, 1.0, 1, 32),
        (0.15, 20, 0.5, 0, 6),  # though more wait, six keep the pace
        (0.12, 15, 0.6, 0, 3),  # three do not, but the rest can still be caught up with
    ],
)
def test_a_head_is_passed_over_only_where_the_pace_needs_it(
    head_s: float, behind: int, behind_s: float, first: int, size: int
) -> None:
    requests = waiting(head_s, *[behind_s] * behind)
    assert choice(requests, load(5.0)) == (0, list(range(first, first + size)))


def test_no_more_can_miss_than_there_are() -> None:
    # the best tier answers both in time; that it leaves none for others costs nothing: there are
    # hardly any
    assert choice(waiting(0.5, 0.5), load(2.0, budgets_s=(0.5,))) == (2, [0, 1])


@pytest.mark.parametrize(("tier_table", "tier"), [(TIER_TABLE, 0), (STEEP, 1)])
def test_accuracy_must_pay_for_what_may_be_missed_at_worst(
    tier_table: TierTable, tier: int
) -> None:
    # bursts of four: 0.2 s on the middle tier may come in the way of the next
    assert choice(waiting(0.5), bursts(4, 1.0, 0.5), tier_table=tier_table) == (tier, [0])


@pytest.mark.parametrize(("tier_table", "tier"), [(TIER_TABLE, 1), (STEEP, 2)])
def test_accuracy_must_pay_for_those_who_are_expected_to_come_too_late(
    tier_table: TierTable, tier: int
) -> None:
    # twenty a second with 0.5 s each: 0.4 s on the best tier leave the first of them no time
    assert choice(waiting(2.0), load(20.0, budgets_s=(0.5,)), tier_table=tier_table) == (tier, [0])


@pytest.mark.parametrize(("devices", "tier"), [(1, 0), (2, 1), (4, 2)])
def test_devices_share_what_waits(devices: int, tier: int) -> None:
    assert choice(waiting(*[1.0] * 40), devices=devices)[0] == tier


@pytest.mark.parametrize(("devices", "tier"), [(1, 1), (3, 2)])
def test_devices_share_what_is_to_come(devices: int, tier: int) -> None:
    assert choice(waiting(1.0), bursts(2, 0.2, 0.6), devices=devices) == (tier, [0])


def test_who_does_not_allow_a_tier_is_not_taken_along() -> None:
    pinned = Request(99, 0.0, 0.9, (0,))
    assert choice([*waiting(2.0, 2.0, tiers=(1, 2)), pinned]) == (2, [0, 1])


def test_who_can_wait_does_not_overtake_because_he_is_pinned_to_a_cheaper_tier() -> None:
    """Forty are due in a second; the one that only the cheapest tier may answer has five."""
    urgent = [Request(i, 0.0, 1.0, (1, 2)) for i in range(40)]
    tier, taken = choice([*urgent, Request(40, 0.0, 5.0, (0,))])
    assert tier == 1
    assert 40 not in taken
