"""No request starves: with exact predictions, every accepted request meets its deadline."""

import heapq
from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcae_serve.scheduling.escalation import Escalation, Escalations, Step
from pcae_serve.scheduling.events import (
    Action,
    Answer,
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
from pcae_serve.scheduling.feasibility import Backlog, keep_feasible
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.base import Run, Wait
from pcae_serve.scheduling.policies.registry import OURS, PUBLISHED, create
from pcae_serve.scheduling.request_queue import Queue, Request
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable
from tests.support.scheduler_views import LATENCY

TIER_TABLE = TierTable(("fast", "mid", "full"), (0.90, 0.95, 1.00))
#: Policies by name; after @, the price of waiting.
POLICIES = [*OURS, *PUBLISHED, "fixed:full", "fixed:fast", "nexus:mid", "pace+drop", "greedy+drop"]
POLICIES += ["pace@0.1", "pace@3", "pace+drop@1"]
#: What second looks gain at margins up to 0.1, 0.3 and 0.6.
STEPS = tuple(Step(margin, 0.25, gain) for margin, gain in ((0.1, 0.4), (0.3, 0.2), (0.6, 0.01)))
LOOKS = Escalations([Escalation(i, j, STEPS) for i, j in ((0, 1), (0, 2), (1, 2))])
#: Seconds of one image by tier.
IMAGE_S = (0.010, 0.030, 0.060)


@dataclass
class ExactWorld:
    """A scheduler on a virtual clock, with batches that take exactly the predicted time."""

    scheduler: Scheduler
    seconds: list[dict[int, Seconds]]
    closed_loop: float = 0.0  # budget of the requests that replace answered ones of that budget
    requests: dict[int, Request] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    agenda: list[tuple[float, int, Event]] = field(default_factory=list)
    timer_s: float = inf
    order: int = 0
    looks: bool = False  # answers may be unsure, and run again
    in_hand: set[int] = field(default_factory=set)  # have a first answer, which is not sent
    looked: int = 0  # second looks that ran

    @classmethod
    def create(
        cls,
        policy: str,
        *,
        devices: int = 1,
        batching: bool = False,
        closed_loop: float = 0.0,
        looks: bool = False,
    ) -> "ExactWorld":
        """batching: an image of a large batch costs 0.3 of a single one; else each the same."""
        fixed, each = (0.7, 0.3) if batching else (0.0, 1.0)
        seconds = [
            {b: Seconds(s * (fixed + each * b), s * (fixed + each * b)) for b in range(1, 9)}
            for s in IMAGE_S
        ]
        name, _, price = policy.partition("@")
        policy_ = create(name, TIER_TABLE, float(price or 0))
        scheduler = Scheduler(
            policy_,
            Latency(seconds, 8),
            devices=devices,
            max_batch=8,
            escalations=LOOKS if looks else None,
        )
        return cls(scheduler, seconds, closed_loop, looks=looks)

    def offer(self, now_s: float, budget_s: float, tiers: tuple[int, ...], caller: str = "") -> int:
        id_, deadline_s = len(self.requests), now_s + budget_s
        self.requests[id_] = request = Request(
            id_, now_s, deadline_s, tiers, caller=caller, max_looks=1 + self.looks
        )
        self._push(Arrived(now_s, request))
        return id_

    def run(self, until_s: float = inf) -> None:
        while True:
            next_s = min(self.timer_s, self.agenda[0][0] if self.agenda else inf)
            if next_s == inf or next_s > until_s:
                return
            if self.timer_s < (self.agenda[0][0] if self.agenda else inf):
                event: Event = Timer(self.timer_s)
                self.timer_s = inf
            else:
                _, _, event = heapq.heappop(self.agenda)
            self._handle(event)

    def _push(self, event: Event) -> None:
        self.order += 1
        heapq.heappush(self.agenda, (event.now_s, self.order, event))

    def _handle(self, event: Event) -> None:
        now_s = event.now_s
        if isinstance(event, Done):
            self.in_hand |= {id_ for id_, _ in event.margins}
        actions: list[Action] = self.scheduler.handle(event)
        if isinstance(event, Arrived) and not actions:
            self._handle(Decoded(now_s, event.request.id))
        for action in actions:
            match action:
                case Dispatch(device=device, tier=tier, ids=ids):
                    took_s = self.seconds[tier][len(ids)].p50
                    again = self.in_hand & set(ids)
                    assert again in (set(), set(ids))
                    self.in_hand -= again
                    self.looked += len(again)
                    margins = list[tuple[int, float]]()
                    for id_ in set(ids) - again:
                        if self.looks and now_s + took_s < self.requests[id_].deadline_s:
                            margins.append((id_, id_ % 7 / 10))
                    for id_ in set(ids) - again:
                        request = self.requests[id_]
                        in_time = now_s + took_s <= request.deadline_s
                        self.ends[id_] = "in time" if in_time else "late"
                        if self.closed_loop == round(request.budget_s, 6):
                            self.offer(now_s + took_s, self.closed_loop, request.tiers)
                    self._push(Done(now_s + took_s, device, took_s, tuple(margins)))
                case Answer(id=id_):
                    self.in_hand.remove(id_)
                case Reject(id=id_):
                    self.ends[id_] = "rejected"
                case Remove(id=id_, why=why):
                    self.ends[id_] = why
                case SetTimer(at_s=at_s):
                    self.timer_s = max(at_s, now_s)


def check_all_accepted_in_time(
    policy: str,
    offered: list[tuple[float, float, tuple[int, ...]]],
    devices: int,
    batching: bool,
    looks: bool,
) -> None:
    world = ExactWorld.create(policy, devices=devices, batching=batching, looks=looks)
    now_s = 0.0
    for i, (gap_s, budget_s, tiers) in enumerate(offered):
        now_s += gap_s
        world.offer(now_s, budget_s, tiers, caller=f"caller{i % 3}")
    world.run()
    assert len(world.ends) == len(offered)
    assert not world.in_hand
    missed = {id_: end for id_, end in world.ends.items() if end not in ("in time", "rejected")}
    if devices == 1 and batching:  # the documented exception: see Scheduler._stays_feasible
        missed = {id_: end for id_, end in missed.items() if not shares_its_tier(world, id_)}
    assert missed == {}


def shares_its_tier(world: ExactWorld, id_: int) -> bool:
    """Return whether another accepted request of the same cheapest tier was there meanwhile."""
    missed = world.requests[id_]
    return any(
        other.tiers[0] == missed.tiers[0]
        and other.arrival_s < missed.deadline_s
        and missed.arrival_s < other.deadline_s
        for other in world.requests.values()
        if other.id != id_ and world.ends[other.id] != "rejected"
    )


OFFERED = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.2]),  # seconds since the request before
        st.sampled_from([0.05, 0.1, 0.3, 1.0, 5.0, 60.0]),  # budget
        st.sampled_from([(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]),
    ),
    min_size=1,
    max_size=120,
)
DEVICES = st.sampled_from([1, 1, 2, 3])


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15)
@given(offered=OFFERED, devices=DEVICES, batching=st.booleans(), looks=st.booleans())
def test_every_accepted_request_is_in_time(
    policy: str,
    offered: list[tuple[float, float, tuple[int, ...]]],
    devices: int,
    batching: bool,
    looks: bool,
) -> None:
    check_all_accepted_in_time(policy, offered, devices, batching, looks)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=300)
@given(offered=OFFERED, devices=DEVICES, batching=st.booleans(), looks=st.booleans())
def test_every_accepted_request_is_in_time_in_many_cases(
    policy: str,
    offered: list[tuple[float, float, tuple[int, ...]]],
    devices: int,
    batching: bool,
    looks: bool,
) -> None:
    check_all_accepted_in_time(policy, offered, devices, batching, looks)


def test_a_queue_of_one_tier_may_lose_one_of_its_own() -> None:
    """The exception: a batch of both would be late for the first, one by one for the second.

    To refuse the second would cost up to 3.6 points of attainment on traces: refusals of requests
    that have room in a batch add up to more than the deadlines that they save.
    """
    world = ExactWorld.create("pace", batching=True)
    for at_s, budget_s, tier in ((0.0, 0.05, 1), (0.0, 0.1, 2), (0.01, 0.1, 2)):
        world.offer(at_s, budget_s, (tier,))
    world.run()
    assert sorted(world.ends.values()) == ["expired", "in time", "in time"]


@pytest.mark.parametrize("policy", ["pace", "pace@0.1", "greedy", "fixed:full"])
@pytest.mark.parametrize(("tiers", "budget_s"), [((0,), 1.0), ((1,), 3.0), ((0, 1), 1.0)])
def test_clients_pinned_to_an_expensive_tier_starve_no_other(
    policy: str, tiers: tuple[int, ...], budget_s: float
) -> None:
    """Three closed loops pinned to `full` with 5 s, and a client with a smaller budget."""
    world = ExactWorld.create(policy, closed_loop=5.0)
    for _ in range(3):
        world.offer(0.0, 5.0, (2,))
    polite = [world.offer(0.5 + i / 2, budget_s, tiers) for i in range(20)]
    world.run(until_s=20.0)
    assert [world.ends[id_] for id_ in polite] == ["in time"] * 20


# one decision: 0.1, 0.2 and 0.4 s for one image on the three tiers


def decide(
    choice: Run | Wait, *requests: Request, overloaded: bool = False, latest_start_s: float = inf
) -> Run | Wait:
    queue = Queue()
    for request in requests:
        queue.add(request)
    backlog = Backlog((0.0,), dict(queue.by_cheapest), LATENCY.forecast(0.0), 32)
    return keep_feasible(
        choice,
        backlog,
        queue,
        now_s=0.0,
        device=0,
        latest_start_s=latest_start_s,
        overloaded=overloaded,
    )


def test_a_choice_that_costs_no_deadline_is_kept() -> None:
    urgent, pinned = Request(0, 0.0, 0.6, (0,)), Request(1, 0.0, 9.0, (2,))
    better = Run(2, (pinned,))  # until 0.4 s; the urgent one then ends at 0.5 s
    assert decide(better, urgent, pinned) == better


@pytest.mark.parametrize("overloaded", [False, True])
def test_a_choice_that_costs_another_tiers_deadline_is_replaced(overloaded: bool) -> None:
    urgent, pinned = Request(0, 0.0, 0.45, (0,)), Request(1, 0.0, 9.0, (2,))
    choice = Run(2, (pinned,))
    assert decide(choice, urgent, pinned, overloaded=overloaded) == Run(0, (urgent,))


def test_waiting_ends_before_it_costs_a_deadline() -> None:
    one, other = Request(0, 0.0, 0.45, (0,)), Request(1, 0.0, 0.55, (2,))
    assert decide(Wait(0.01), one, other, latest_start_s=0.1) == Wait(0.01)
    assert decide(Wait(0.2), one, other, latest_start_s=0.1) == Run(0, (one,))


def test_under_overload_a_policy_may_pass_over_requests_of_its_own_tier() -> None:
    head = Request(0, 0.0, 0.105, (0, 1))  # leaves time for itself alone: 0.1 s
    others = [Request(i, 0.0, 0.115 + i / 1e3, (0, 1)) for i in (1, 2)]
    passing = Run(0, tuple(others))
    assert decide(passing, head, *others, overloaded=True) == passing


def test_a_backlog_that_cannot_be_met_keeps_the_choice_that_saves_as_many() -> None:
    late, other = Request(0, 0.0, 0.05, (0,)), Request(1, 0.0, 0.45, (2,))
    assert decide(Run(2, (other,)), late, other) == Run(2, (other,))
