"""Properties of every policy in the registry, in random situations."""

import dataclasses
from collections.abc import Iterator, Sequence
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
    """Draw up to three successive views of one scheduler, with any load and any queue."""
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
        pinned = draw(st.booleans())  # every request allows one tier
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
def test_a_choice_is_valid_and_deterministic(spec: str, case: Case) -> None:
    policy, twin = create(spec, case.tier_table), create(spec, case.tier_table)
    for now in case.scheduler_views:
        queue = now.queue
        before = [list(queue), *(list(queue.allowing(tier)) for tier in queue.tiers)]
        choice = policy.choose(now)
        assert [list(queue), *(list(queue.allowing(tier)) for tier in queue.tiers)] == before
        assert twin.choose(now) == choice, "not deterministic"
        if isinstance(choice, Wait):
            assert choice.until_s > now.now_s
            continue
        assert 1 <= len(choice.requests) <= now.max_batch
        assert all(choice.tier in request.tiers for request in choice.requests)
        concerned = [request.id for request in choice.requests + choice.dropped]
        assert len(set(concerned)) == len(concerned), "a request is named twice"
        assert all(id_ in queue for id_ in concerned)
        took_s = now.forecast.p50(choice.tier, len(choice.requests)) * 1.2
        policy.observe(choice, took_s, 0)
        twin.observe(choice, took_s, 0)


@every_policy
def test_only_early_drop_drops_requests(spec: str) -> None:
    run = create(spec, TIER_TABLE).choose(view(waiting(0.101, *[0.5] * 40)))
    assert isinstance(run, Run)
    assert not run.dropped or spec.startswith("nexus") or spec.endswith("+drop")


@every_policy
def test_a_single_request_with_time_is_served(spec: str) -> None:
    run = create(spec, TIER_TABLE).choose(view(waiting(100.0)))
    assert isinstance(run, Run)
    assert ids(run) == [0]
    assert not run.dropped


@every_policy
@pytest.mark.parametrize("tier", ALL)
def test_a_pinned_request_gets_its_tier(spec: str, tier: int) -> None:
    run = create(spec, TIER_TABLE).choose(view(waiting(100.0, tiers=(tier,))))
    assert isinstance(run, Run)
    assert run.tier == tier


class _CountingList(list[Request]):
    """A list that counts the requests read from it."""

    reads = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        found = super().__getitem__(index)
        _CountingList.reads += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[Request]:
        for request in super().__iter__():
            _CountingList.reads += 1
            yield request


class _CountingQueue(Queue):
    @property
    def by_deadline(self) -> Sequence[Request]:
        return _CountingList(super().by_deadline)

    def allowing(self, tier: int) -> Sequence[Request]:
        return _CountingList(super().allowing(tier))


@every_policy
def test_a_decision_reads_only_a_small_part_of_a_long_queue(spec: str) -> None:
    queue = _CountingQueue()
    for request in waiting(*[0.12] * 5, *[9.0] * 5000):
        queue.add(request)
    _CountingList.reads = 0
    create(spec, TIER_TABLE).choose(dataclasses.replace(view(waiting(1.0)), queue=queue))
    assert _CountingList.reads < 500
