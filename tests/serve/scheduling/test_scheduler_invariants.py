"""What the scheduler keeps to under every policy, through lives of requests drawn at random."""

from collections import Counter
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcae_serve.scheduling.background import GUARANTEED_SHARE, MAX_PAUSE_S, SPARE_SHARE
from pcae_serve.scheduling.events import (
    Action,
    Arrived,
    BatchAccounted,
    ClientLeft,
    Decoded,
    Dispatch,
    Done,
    Event,
    Reject,
    Remove,
    SetTimer,
    StartTask,
    TaskSubmitted,
    TierDisabled,
    Timer,
)
from pcae_serve.scheduling.latency import Latency
from pcae_serve.scheduling.policies.registry import NAMES, WITH_TIER, create
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from tests.support.scheduler_views import ALL, LINES, TIER_TABLE, linear

BASES = [f"{n}:{t}" for n in WITH_TIER for t in ("fastest", "best")]
BASES += [name for name in NAMES if name not in WITH_TIER]
every_policy = pytest.mark.parametrize("spec", [f"{b}{d}" for b in BASES for d in ("", "+drop")])

#: A deadline's timer may fire so much after it: see scheduler.py.
TIMER_S = 2e-4


@dataclass
class Life:
    """One request, as its client and the decoder make it."""

    gap_s: float  # since the one before
    budget_s: float
    tiers: tuple[int, ...]
    decode_s: float
    leaves_s: float | None  # after its arrival


@dataclass
class Case:
    lives: list[Life]
    devices: int
    max_batch: int
    queue_limit: int
    times: list[float]  # of the forecast that batches take, in turn; 0: the engine fails
    closed: dict[int, float]  # tiers that leave routing, and when
    tasks: list[tuple[float, float]]  # when they are offered, and seconds that they take


lives = st.builds(
    Life,
    gap_s=st.sampled_from((0.0, 0.001, 0.01, 0.05, 0.3)),
    budget_s=st.sampled_from((0.05, 0.11, 0.3, 0.8, 5.0)),
    tiers=st.sampled_from((ALL, ALL, (0,), (1, 2), (2,))),
    decode_s=st.sampled_from((0.0, 0.005, 0.2)),
    # before it is decoded, while it waits, while it runs, after its end
    leaves_s=st.sampled_from((None, None, None, None, 0.001, 0.1, 0.3, 9.0)),
)
cases = st.builds(
    Case,
    lives=st.lists(lives, min_size=1, max_size=40),
    devices=st.integers(1, 3),
    max_batch=st.sampled_from((1, 4, 32)),
    queue_limit=st.sampled_from((8, 256)),
    times=st.lists(st.sampled_from((1.0, 1.0, 0.5, 1.2, 3.0, 0.0)), min_size=1, max_size=5),
    closed=st.dictionaries(st.sampled_from((0, 2)), st.sampled_from((0.0, 0.02, 0.4)), max_size=2),
    tasks=st.lists(
        st.tuples(st.sampled_from((0.0, 0.1, 0.5)), st.sampled_from((0.01, 0.3))), max_size=3
    ),
)


@dataclass
class World:
    """Clients, decoder, devices and timer around one machine; checks each of its actions."""

    case: Case
    latency: Latency
    machine: Scheduler
    told: list[tuple[Event, list[Action]]] = field(default_factory=list)
    requests: dict[int, Request] = field(default_factory=dict)
    waiting: dict[int, float] = field(default_factory=dict)  # id -> since when it is decoded
    ends: Counter[int] = field(default_factory=Counter)
    left: set[int] = field(default_factory=set)
    running: dict[int, Dispatch] = field(default_factory=dict)
    cancelled: Counter[int] = field(default_factory=Counter)  # device -> of its batch
    agenda: list[tuple[float, int, Event]] = field(default_factory=list)
    wake_s: float = float("inf")
    batches: int = 0
    closed: set[int] = field(default_factory=set)
    tasks: list[int] = field(default_factory=list)  # offered, not begun
    on_tasks: set[int] = field(default_factory=set)  # devices

    def play(self) -> None:
        now_s = 0.0
        for tier, at_s in self.case.closed.items():
            self.plan(TierDisabled(at_s, tier))
        for id_, (at_s, seconds) in enumerate(self.case.tasks):
            self.plan(TaskSubmitted(at_s, id_, seconds))
        for id_, life in enumerate(self.case.lives):
            now_s += life.gap_s
            deadline_s, caller = now_s + life.budget_s, f"caller{id_ % 3}"
            request = Request(id_, now_s, deadline_s, life.tiers, caller=caller)
            self.requests[id_] = request
            self.plan(Arrived(now_s, request))
            self.plan(Decoded(now_s + life.decode_s, id_))
            if life.leaves_s is not None:
                self.plan(ClientLeft(now_s + life.leaves_s, id_))
        while self.agenda or self.wake_s < float("inf"):
            if not self.agenda or self.wake_s <= self.agenda[0][0]:
                event: Event = Timer(self.wake_s)
                self.wake_s = float("inf")
            else:
                event = heappop(self.agenda)[2]
            self.happens(event)

    def plan(self, event: Event) -> None:
        heappush(self.agenda, (event.now_s, len(self.agenda) + 1000 * len(self.told), event))

    def happens(self, event: Event) -> None:
        match event:
            case Arrived(now_s=now_s, request=request) if self.closed & {*request.tiers}:
                if not (tiers := tuple(t for t in request.tiers if t not in self.closed)):
                    self.left.add(request.id)  # nobody lets it in
                    return
                self.requests[request.id] = request = replace(request, tiers=tiers)
                event = Arrived(now_s, request)
            case TierDisabled(tier=tier):
                self.closed.add(tier)
            case TaskSubmitted(id=id_):
                self.tasks.append(id_)
            case Decoded(id=id_) if id_ in self.left or self.ends[id_]:
                return  # nobody decodes for one who left or was refused
            case Decoded(id=id_, now_s=now_s):
                self.waiting[id_] = now_s
            case ClientLeft(id=id_):
                self.left.add(id_)
                self.waiting.pop(id_, None)
                for device, dispatch in self.running.items():
                    self.cancelled[device] += id_ in dispatch.ids
        if isinstance(event, Done) and event.device in self.on_tasks:
            self.on_tasks.discard(event.device)
        actions = self.machine.handle(event)
        self.told.append((event, actions))
        for action in actions:
            match action:
                case Dispatch():
                    self.dispatched(action, event.now_s)
                case Reject(id=id_):
                    assert isinstance(event, Arrived)
                    assert event.request.id == id_
                    self.ends[id_] += 1
                case Remove(id=id_, why="failed"):
                    assert isinstance(event, TierDisabled)
                    assert self.closed >= {*self.requests[id_].tiers}
                    self.waiting.pop(id_, None)  # it may still have been decoded
                    self.ends[id_] += 1
                case Remove(id=id_):
                    self.expired(id_, event.now_s)
                case StartTask(device=device, id=id_):
                    self.begun(id_, event.now_s)
                    assert device not in self.running.keys() | self.on_tasks
                    assert id_ == self.tasks.pop(0)
                    self.on_tasks.add(device)
                    self.plan(Done(event.now_s + self.case.tasks[id_][1], device, None))
                case SetTimer(at_s=at_s):
                    assert at_s >= event.now_s
                    self.wake_s = at_s
                case BatchAccounted() as spent:
                    assert isinstance(event, Done)
                    self.done(event, spent)

    def begun(self, id_: int, now_s: float) -> None:
        """Requests that wait for a task have the time to, or the task has waited long."""
        at_s, seconds = self.case.tasks[id_]
        waited_s = now_s - at_s
        if self.waiting and waited_s <= min(MAX_PAUSE_S, seconds / GUARANTEED_SHARE):
            assert waited_s > min(MAX_PAUSE_S, seconds / SPARE_SHARE), "somebody waits for it"
            first_s = min(self.requests[id_].deadline_s for id_ in self.waiting)
            assert now_s + seconds < first_s, "somebody misses his deadline"

    def dispatched(self, dispatch: Dispatch, now_s: float) -> None:
        assert dispatch.device not in self.running.keys() | self.on_tasks
        assert dispatch.tier not in self.closed
        assert 1 <= len(dispatch.ids) <= self.case.max_batch
        forecast = self.latency.forecast(now_s)
        for id_ in dispatch.ids:
            assert id_ in self.waiting, "it left, or was answered, or is not decoded"
            del self.waiting[id_]
            self.ends[id_] += 1
            request = self.requests[id_]
            assert dispatch.tier in request.tiers
            soonest_s = now_s + forecast.p50(request.tiers[0], 1)
            assert soonest_s <= request.deadline_s + 1e-9, "it cannot be in time any more"
        self.running[dispatch.device] = dispatch
        times = self.case.times[self.batches % len(self.case.times)]
        self.batches += 1
        seconds = forecast.p50(dispatch.tier, len(dispatch.ids)) * (times or 1.0)
        self.plan(Done(now_s + seconds, dispatch.device, seconds if times else None))

    def expired(self, id_: int, now_s: float) -> None:
        since_s = self.waiting.pop(id_)  # or it left, or was answered
        self.ends[id_] += 1
        assert now_s <= max(since_s, self.requests[id_].deadline_s) + TIMER_S, "it starved"

    def done(self, event: Done, spent: BatchAccounted) -> None:
        dispatch = self.running.pop(event.device)
        assert spent.batch == len(dispatch.ids)
        assert spent.tier == dispatch.tier
        assert spent.seconds == (event.seconds or 0.0)
        assert spent.cancelled == self.cancelled.pop(event.device, 0)
        deadlines_s = [self.requests[i].deadline_s for i in dispatch.ids if i not in self.left]
        assert spent.late == sum(deadline_s < event.now_s for deadline_s in deadlines_s)


def world(spec: str, case: Case) -> World:
    latency = linear(*LINES, tail=1.2)
    machine = Scheduler(
        create(spec, TIER_TABLE),
        latency,
        devices=case.devices,
        max_batch=case.max_batch,
        queue_limit=case.queue_limit,
    )
    return World(case, latency, machine)


@every_policy
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(cases)
def test_every_request_is_dealt_with_rightly_and_once(spec: str, case: Case) -> None:
    first = world(spec, case)
    first.play()
    assert not first.machine.policy_failed
    assert first.machine.waiting == 0
    assert not first.waiting, "somebody was forgotten"
    assert not first.tasks, "a task was forgotten"
    assert set(first.ends.values()) <= {1}, "somebody was answered twice"
    assert set(first.ends) | first.left >= set(first.requests)

    again = world(spec, case).machine
    for event, actions in first.told:
        assert again.handle(event) == actions
