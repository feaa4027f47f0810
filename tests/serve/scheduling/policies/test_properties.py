"""What every policy of the catalogue must keep to, in situations drawn at random."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.base import Run, SchedulerView, Wait
from pcae_serve.scheduling.policies.registry import NAMES, WITH_TIER, create
from pcae_serve.scheduling.request_queue import Queue, Request
from pcae_serve.scheduling.tiers import TierTable
from tests.support.scheduler_views import ALL, TIER_TABLE, ids, view, waiting

BASES = [
    spec
    for name in NAMES
    for spec in ([f"{name}:fastest", f"{name}:best"] if name in WITH_TIER else [name])
]
SPECS = [f"{base}{drop}" for base in BASES for drop in ("", "+drop")]
every_policy = pytest.mark.parametrize("spec", SPECS)

seconds = st.floats(1e-3, 2.0)


@dataclass
class Case:
    tier_table: TierTable
    latency: Latency
    scheduler_views: list[SchedulerView]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to three situations in a row on one machine, of any load and any queue."""
    count = draw(st.integers(1, 4))
    accuracy = tuple(sorted(draw(st.floats(0.1, 1.0)) for _ in range(count)))
    most = draw(st.integers(1, 32))
    points = []
    for tier in range(count):
        one_s = 1e-3 * (tier + 1) * draw(st.floats(1.0, 5.0))
        full_s, tail = one_s * draw(st.floats(1.0, 32.0)), draw(st.floats(1.0, 2.0))
        points.append({1: Seconds(one_s, one_s * tail), 32: Seconds(full_s, full_s * tail)})
    latency, arrivals, now_s, id_ = Latency(points, most), Arrivals(), 0.0, 0
    scheduler_views = []
    for _ in range(draw(st.integers(1, 3))):
        queue = Queue()
        pinned = draw(st.booleans())  # nobody leaves the choice to the policy
        for gap_s, budget_s in draw(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=50)):
            now_s += gap_s * draw(st.sampled_from((0.0, 1e-3, 1.0)))
            first = draw(st.integers(0, count - 1))
            last = first if pinned else draw(st.integers(first, count - 1))
            queue.add(Request(id_, now_s, now_s + budget_s, tuple(range(first, last + 1))))
            arrivals.observe(now_s, budget_s)
            id_ += 1
        devices = draw(st.integers(1, 4))
        scheduler_views.append(
            SchedulerView(now_s, queue, latency.forecast(now_s), arrivals, most, devices)
        )
    names = tuple(f"tier-{tier}" for tier in range(count))
    return Case(TierTable(names, accuracy), latency, scheduler_views)


@every_policy
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(cases())
def test_what_a_policy_must_keep_to(spec: str, case: Case) -> None:
    policy, twin = create(spec, case.tier_table), create(spec, case.tier_table)
    for now in case.scheduler_views:
        queue = now.queue
        before = [list(queue), *(list(queue.allowing(tier)) for tier in queue.tiers)]
        choice = policy.choose(now)
        assert [list(queue), *(list(queue.allowing(tier)) for tier in queue.tiers)] == before
        assert twin.choose(now) == choice, "it is not deterministic"
        if isinstance(choice, Wait):
            assert choice.until_s > now.now_s
            continue
        assert 1 <= len(choice.requests) <= now.max_batch
        assert all(choice.tier in request.tiers for request in choice.requests)
        concerned = [request.id for request in choice.requests + choice.dropped]
        assert len(set(concerned)) == len(concerned), "somebody is named twice"
        assert all(id_ in queue for id_ in concerned)
        took_s = now.forecast.p50(choice.tier, len(choice.requests)) * 1.2
        policy.observe(choice, took_s, 0)
        twin.observe(choice, took_s, 0)


@every_policy
def test_only_early_drop_lets_anybody_go(spec: str) -> None:
    run = create(spec, TIER_TABLE).choose(view(waiting(0.101, *[0.5] * 40)))
    assert isinstance(run, Run)
    assert not run.dropped or spec.startswith("nexus") or spec.endswith("+drop")


@every_policy
def test_whoever_is_alone_and_has_time_is_served(spec: str) -> None:
    run = create(spec, TIER_TABLE).choose(view(waiting(100.0)))
    assert isinstance(run, Run)
    assert ids(run) == [0]
    assert not run.dropped


@every_policy
@pytest.mark.parametrize("tier", ALL)
def test_a_request_pinned_to_a_tier_gets_that_tier(spec: str, tier: int) -> None:
    run = create(spec, TIER_TABLE).choose(view(waiting(100.0, tiers=(tier,))))
    assert isinstance(run, Run)
    assert run.tier == tier
