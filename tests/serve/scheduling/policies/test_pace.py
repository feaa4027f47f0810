"""Pace by its choices; one image takes 0.1, 0.2 and 0.4 s on the three tiers.

A further image of a batch takes a tenth of that; the accuracies are 80, 85 and 90 %.
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

#: The same tiers with larger differences in accuracy.
STEEP = TierTable(TIER_TABLE.names, (0.20, 0.50, 0.90))


def bursts(size: int, every_s: float, budget_s: float) -> Arrivals:
    """Return arrivals in bursts of `size`; the last one was `every_s` ago."""
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
    """Return the tier and the requests that run."""
    run = Pace(tier_table).choose(view(requests, arrivals=arrivals, devices=devices))
    return run.tier, ids(run)


@pytest.mark.parametrize(
    ("budget_s", "tier"), [(10.0, 2), (0.41, 2), (0.39, 1), (0.21, 1), (0.19, 0), (0.11, 0)]
)
def test_on_an_idle_machine_the_best_tier_that_fits_is_chosen(budget_s: float, tier: int) -> None:
    assert choice(waiting(budget_s)) == (tier, [0])


def test_few_arrivals_do_not_lower_the_tier_of_a_loose_budget() -> None:
    assert choice(waiting(2.0), load(1.0, budgets_s=(2.0,))) == (2, [0])


@pytest.mark.parametrize(("count", "tier"), [(5, 2), (10, 2), (20, 1), (40, 0)])
def test_more_queued_requests_lower_the_tier(count: int, tier: int) -> None:
    assert choice(waiting(*[1.0] * count))[0] == tier


@pytest.mark.parametrize(("size", "tier"), [(1, 2), (2, 1), (4, 0)])
def test_more_expected_requests_lower_the_tier(size: int, tier: int) -> None:
    assert choice(waiting(1.0), bursts(size, 1.0, 0.5)) == (tier, [0])


def test_overload_takes_the_cheapest_tier_in_a_large_batch() -> None:
    tier, run = choice(waiting(*[1.0] * 60), load(60.0))
    assert tier == 0
    assert len(run) > 16


def play(rate: float, devices: int = 1) -> Outcome:
    """Simulate 600 Poisson arrivals with a budget of 1 s."""
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
    # with budgets of 1 s a batch holds up to 22, in 0.31 s: at most 71 per second
    assert np.mean(over.batches) > 16
    assert (over.end == End.IN_TIME).sum() / over.span_s > 50


@pytest.mark.parametrize(
    ("head_s", "behind", "behind_s", "first", "size"),
    [
        (0.15, 5, 1.0, 0, 6),  # the first request has time for six
        (0.15, 30, 1.0, 0, 6),
        (0.15, 40, 1.0, 1, 32),
        (0.15, 60, 1.0, 1, 32),
        (0.15, 20, 0.5, 0, 6),  # more are queued, but six sustain the required throughput
        (0.12, 15, 0.6, 0, 3),  # three do not, but the others still have time
    ],
)
def test_urgent_requests_are_passed_over_only_if_throughput_requires_it(
    head_s: float, behind: int, behind_s: float, first: int, size: int
) -> None:
    requests = waiting(head_s, *[behind_s] * behind)
    assert choice(requests, load(5.0)) == (0, list(range(first, first + size)))


def test_expected_misses_are_bounded_by_the_number_of_requests() -> None:
    # the best tier answers both in time, and hardly any others are expected
    assert choice(waiting(0.5, 0.5), load(2.0, budgets_s=(0.5,))) == (2, [0, 1])


@pytest.mark.parametrize(("tier_table", "tier"), [(TIER_TABLE, 0), (STEEP, 1)])
def test_accuracy_must_outweigh_misses_in_the_worst_case(tier_table: TierTable, tier: int) -> None:
    # bursts of four: 0.2 s on the middle tier may delay the next burst
    assert choice(waiting(0.5), bursts(4, 1.0, 0.5), tier_table=tier_table) == (tier, [0])


@pytest.mark.parametrize(("tier_table", "tier"), [(TIER_TABLE, 1), (STEEP, 2)])
def test_accuracy_must_outweigh_expected_misses(tier_table: TierTable, tier: int) -> None:
    # 20 per second with 0.5 s each: 0.4 s on the best tier leave the first of them no time
    assert choice(waiting(2.0), load(20.0, budgets_s=(0.5,)), tier_table=tier_table) == (tier, [0])


@pytest.mark.parametrize(("devices", "tier"), [(1, 0), (2, 1), (4, 2)])
def test_devices_share_queued_requests(devices: int, tier: int) -> None:
    assert choice(waiting(*[1.0] * 40), devices=devices)[0] == tier


@pytest.mark.parametrize(("devices", "tier"), [(1, 1), (3, 2)])
def test_devices_share_expected_requests(devices: int, tier: int) -> None:
    assert choice(waiting(1.0), bursts(2, 0.2, 0.6), devices=devices) == (tier, [0])


def test_a_request_that_does_not_allow_the_tier_is_not_in_the_batch() -> None:
    pinned = Request(99, 0.0, 0.9, (0,))
    assert choice([*waiting(2.0, 2.0, tiers=(1, 2)), pinned]) == (2, [0, 1])


def test_a_loose_request_does_not_overtake_because_it_is_pinned_to_a_cheaper_tier() -> None:
    """Forty requests have 1 s; the one pinned to the cheapest tier has 5 s."""
    urgent = [Request(i, 0.0, 1.0, (1, 2)) for i in range(40)]
    tier, taken = choice([*urgent, Request(40, 0.0, 5.0, (0,))])
    assert tier == 1
    assert 40 not in taken
