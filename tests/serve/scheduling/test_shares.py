"""Caller shares alone, and a scheduler with several callers on a virtual clock."""

from collections import Counter, defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcae_serve.scheduling.admission import DeviceCapacity
from pcae_serve.scheduling.events import (
    Arrived,
    Decoded,
    Dispatch,
    Done,
    Event,
    Reject,
    Remove,
    SetTimer,
    Timer,
)
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.scheduling.request_queue import Queue, Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.shares import ACTIVE_S, HOLD_S, MAX_CALLERS, Shares, water_fill
from tests.support.scheduler_views import TIER_TABLE

#: 10 ms an image on each tier, in batches of any size.
IMAGE_S = 0.01
EACH = [{b: Seconds(IMAGE_S * b, IMAGE_S * b) for b in (1, 8)}] * 3


@pytest.mark.parametrize(
    ("amount", "wants", "parts"),
    [
        (1.0, [(0.1, 1), (9.0, 1), (9.0, 1)], [0.1, 0.45, 0.45]),
        (1.0, [(9.0, 1), (9.0, 3)], [0.25, 0.75]),
        (1.0, [(0.2, 1), (0.3, 1)], [0.2, 0.3]),
        (0.0, [(0.2, 1)], [0.0]),
    ],
)
def test_what_one_does_not_want_goes_to_the_others_by_weight(
    amount: float, wants: list[tuple[float, float]], parts: list[float]
) -> None:
    assert water_fill(amount, wants) == pytest.approx(parts)


@given(
    st.floats(0, 10),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 100)), min_size=1, max_size=10),
)
def test_no_part_exceeds_what_is_wanted(amount: float, wants: list[tuple[float, float]]) -> None:
    parts = water_fill(amount, wants)
    assert all(0 <= part <= want for part, (want, _) in zip(parts, wants, strict=True))
    assert sum(parts) == pytest.approx(min(amount, sum(want for want, _ in wants)), abs=1e-9)


class Waiting:
    """Shares with requests of 10 ms waiting, all of one tier."""

    def __init__(self, **weights: float) -> None:
        self.queue, self.count = Queue(), 0
        self.shares = Shares(weights, (self.queue,), 100)

    def capacity(self, now_s: float) -> DeviceCapacity:
        return DeviceCapacity(now_s, Latency(EACH, 8).forecast(now_s), 8, 1, 0.0)

    def know(self, *callers: str, requests: int = 1000) -> None:
        """Record so many offered requests of each caller at 0, none of which is admitted."""
        for i in range(requests):
            for caller in callers:
                request = Request(i, 0.0, 1.0, (0,), caller=caller)
                self.shares.arrived(request, self.capacity(0.0))

    def offer(self, caller: str, now_s: float, budget_s: float = 1.0) -> bool:
        """Offer a request; return whether it is admitted."""
        self.count += 1
        request = Request(self.count, now_s, now_s + budget_s, (0,), caller=caller)
        self.shares.arrived(request, self.capacity(now_s))
        if self.shares.is_over(request, self.capacity(now_s)):
            return False
        self.shares.admitted(request, self.capacity(now_s))
        self.queue.add(request)
        return True


def test_without_refusals_for_load_no_caller_has_a_limit() -> None:
    world = Waiting()
    world.know("other", "greedy")
    assert all(world.offer("greedy", 0.0) for _ in range(99))
    world.shares.refused(0.0)
    assert not world.offer("greedy", 0.0)
    assert world.offer("greedy", HOLD_S + 0.01)


def test_a_caller_alone_may_use_everything() -> None:
    world = Waiting()
    world.know("greedy")
    world.shares.refused(0.0)
    assert all(world.offer("greedy", 0.0, budget_s=0.5) for _ in range(99))


@pytest.mark.parametrize(("weight", "most"), [(1.0, 50), (3.0, 75)])
def test_a_caller_over_its_share_has_its_part_of_the_time_until_its_deadline(
    weight: float, most: int
) -> None:
    world = Waiting(greedy=weight)
    world.know("other", "greedy")
    world.shares.refused(0.0)
    assert sum(world.offer("greedy", 0.0) for _ in range(100)) == pytest.approx(most, abs=1)


def test_a_caller_with_a_long_budget_has_its_part_of_the_queue() -> None:
    world = Waiting()
    world.know("other", "greedy")
    world.shares.refused(0.0)
    assert sum(world.offer("greedy", 0.0, budget_s=3600) for _ in range(600)) <= 51


def test_one_request_at_a_time_is_always_admitted_at_the_speed_of_the_share() -> None:
    world = Waiting()
    world.know("other", "one")
    world.shares.refused(0.0)
    assert world.offer("one", 0.0, budget_s=0.011)
    world.queue.remove(world.count)
    assert not world.offer("one", 0.015, budget_s=0.011)
    assert world.offer("one", 0.021, budget_s=0.011)


def test_what_is_known_of_callers_is_bounded_and_forgotten() -> None:
    world = Waiting()
    for i in range(10 * MAX_CALLERS):
        world.shares.arrived(Request(i, 0.0, 1.0, (0,), caller=f"{i}"), world.capacity(0.0))
    assert len(world.shares) == MAX_CALLERS
    late_s = ACTIVE_S + 1
    world.shares.arrived(Request(0, late_s, late_s, (0,), caller="a"), world.capacity(late_s))
    assert len(world.shares) == 1


def test_work_that_ran_first_counts_until_others_have_caught_up() -> None:
    world = Waiting()
    for _ in range(10):
        assert world.offer("short", 0.0, budget_s=0.1)
        assert world.offer("long", 0.0, budget_s=60.0)
    world.shares.refused(0.0)
    capacity = world.capacity(0.0)

    def ahead_s(name: str) -> float:
        return world.shares._callers[name].ahead_s

    short = list(world.queue.by_caller["short"])
    world.shares.starts(short, capacity)
    assert ahead_s("short") == pytest.approx(0.05)
    assert ahead_s("long") == pytest.approx(-0.05)
    for request in short:
        world.queue.remove(request.id)
    world.shares.starts(world.queue.by_caller["long"], capacity)
    assert ahead_s("short") == pytest.approx(0.0)
    assert ahead_s("long") == pytest.approx(0.0)


# --- a scheduler with several callers


class World:
    """A scheduler with one device on a virtual clock; batches take the predicted time."""

    def __init__(self, shares: bool = True, **weights: float) -> None:
        latency = Latency(
            [{b: Seconds(s * b, s * b) for b in (1, 8)} for s in (0.01, 0.02, 0.04)], 8
        )
        self.scheduler = Scheduler(
            create("pace", TIER_TABLE, DEFAULT_PRICE),
            latency,
            max_batch=8,
            queue_limit=256,
            weights=weights,
        )
        self.shares, self.random = shares, Random(0)
        self.requests: dict[int, Request] = {}
        self.callers: dict[int, str] = {}
        self.ends: dict[str, Counter[str]] = defaultdict(Counter)
        self.agenda: list[tuple[float, int, Event | Callable[[float], None]]] = []
        self.order, self.timer_s = 0, float("inf")
        self.then: dict[int, Callable[[float], None]] = {}

    def at(self, time_s: float, event: Event | Callable[[float], None]) -> None:
        self.order += 1
        heappush(self.agenda, (time_s, self.order, event))

    def open_loop(
        self, name: str, per_s: float, budget_s: float, *, since_s: float = 0.0, batch: int = 1
    ) -> None:
        def send(now_s: float) -> None:
            self.at(now_s + self.random.expovariate(per_s / batch), send)
            for _ in range(batch):
                self.offer(name, now_s, budget_s)

        self.at(since_s, send)

    def closed_loop(self, name: str, connections: int, budget_s: float, batch: int = 1) -> None:
        """Connections that send `batch` images, and the next ones 0.1 s after the last answer."""

        def connect() -> Callable[[float], None]:
            left = 0

            def ended(now_s: float) -> None:
                nonlocal left
                left -= 1
                if not left:
                    self.at(now_s + 0.1, send)

            def send(now_s: float) -> None:
                nonlocal left
                left = batch
                for _ in range(batch):
                    self.offer(name, now_s, budget_s, ended)

            return send

        for i in range(connections):
            self.at(i / 1000, connect())

    def offer(
        self, name: str, now_s: float, budget_s: float, then: Callable[[float], None] | None = None
    ) -> None:
        id_ = len(self.requests)
        caller = name if self.shares else ""
        self.requests[id_] = Request(id_, now_s, now_s + budget_s, (0, 1, 2), caller=caller)
        self.callers[id_] = name
        if then:
            self.then[id_] = then
        self.handle(Arrived(now_s, self.requests[id_]))

    def run(self, until_s: float, count_from_s: float) -> None:
        self.count_from_s = count_from_s
        while min(self.agenda[0][0], self.timer_s) <= until_s:
            if self.timer_s < self.agenda[0][0]:
                now_s, self.timer_s = self.timer_s, float("inf")
                self.handle(Timer(now_s))
            else:
                now_s, _, event = heappop(self.agenda)
                self.handle(event) if not callable(event) else event(now_s)

    def end(self, id_: int, now_s: float, how: str) -> None:
        if self.requests[id_].arrival_s >= self.count_from_s:
            self.ends[self.callers[id_]][how] += 1
        if then := self.then.pop(id_, None):
            then(now_s)

    def handle(self, event: Event) -> None:
        now_s, rejected = event.now_s, False
        for action in self.scheduler.handle(event):
            match action:
                case Dispatch(device=device, tier=tier, ids=ids):
                    end_s = now_s + (0.01, 0.02, 0.04)[tier] * len(ids)
                    self.at(end_s, self.finisher(ids))
                    self.at(end_s, Done(end_s, device, end_s - now_s))
                case Reject(id=id_, why=why):
                    rejected = True
                    self.end(id_, now_s, why)
                case Remove(id=id_, why=why):
                    self.end(id_, now_s, why)
                case SetTimer(at_s=at_s):
                    self.timer_s = max(at_s, now_s)
        if isinstance(event, Arrived) and not rejected:
            self.handle(Decoded(now_s, event.request.id))

    def finisher(self, ids: tuple[int, ...]) -> Callable[[float], None]:
        def finish(now_s: float) -> None:
            for id_ in ids:
                late = now_s > self.requests[id_].deadline_s
                self.end(id_, now_s, "late" if late else "in time")

        return finish

    def attainment(self, name: str) -> float:
        return self.ends[name]["in time"] / self.ends[name].total()

    @property
    def answers(self) -> int:
        return sum(ends["in time"] for ends in self.ends.values())


GREEDY: dict[str, Callable[[World], None]] = {
    "10 connections with batches of 64": lambda world: world.closed_loop("greedy", 10, 5.0, 64),
    "2 times the capacity": lambda world: world.open_loop("greedy", 200, 0.5),
    "a full queue": lambda world: world.closed_loop("greedy", 270, 600.0),
}


@pytest.mark.parametrize("greedy", GREEDY)
def test_a_polite_caller_gets_its_share_beside_a_greedy_one(greedy: str) -> None:
    """It asks for half of its share, a quarter of the machine."""
    worlds = {shares: World(shares) for shares in (False, True)}
    for world in worlds.values():
        GREEDY[greedy](world)
        world.open_loop("polite", 25, 0.5, since_s=4.0)
        world.run(until_s=12.0, count_from_s=5.5)
    assert worlds[False].attainment("polite") < 0.9  # or the case shows nothing
    assert worlds[True].attainment("polite") >= 0.95
    assert worlds[True].answers >= 0.9 * worlds[False].answers


def test_greedy_callers_are_served_by_weight() -> None:
    world = World(one=1.0, two=2.0, four=4.0)
    for name in ("one", "two", "four"):
        world.open_loop(name, 150, 0.5)
    world.run(until_s=15.0, count_from_s=4.0)
    for name, weight in (("one", 1), ("two", 2), ("four", 4)):
        part = world.ends[name]["in time"] / world.answers
        assert part == pytest.approx(weight / 7, rel=0.15), name


def test_two_callers_below_their_shares_are_served_as_one() -> None:
    worlds = {shares: World(shares) for shares in (False, True)}
    for world in worlds.values():
        for name in ("one", "two"):
            world.open_loop(name, 40, 0.5)
        world.run(until_s=10.0, count_from_s=0.0)
    assert worlds[True].answers == worlds[False].answers
