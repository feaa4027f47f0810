"""The scheduler alone: times are numbers, nothing sleeps."""

import random

import pytest

from pcae_serve.latency import Latency, Line
from pcae_serve.policies import Request, Run, Situation, Wait
from pcae_serve.policies.greedy import Greedy
from pcae_serve.scheduler import (
    Action,
    Arrived,
    Decoded,
    Dispatch,
    Done,
    Event,
    Expire,
    Left,
    Refuse,
    Scheduler,
    Timer,
    WakeAt,
)

# three tiers, seconds for one image 0.1, 0.2, 0.4; ten more images cost as much as one
LINES = [Line(0.09, 0.01), Line(0.18, 0.02), Line(0.36, 0.04)]
ALL = (0, 1, 2)


def scheduler(**options: int) -> Scheduler:
    return Scheduler(Greedy(), Latency(LINES, spread=1.0), **options)


def arrive(
    machine: Scheduler,
    id_: int,
    now_s: float,
    budget_s: float,
    tiers: tuple[int, ...] = ALL,
) -> list[Action]:
    """A request arrives and is decoded at once."""
    refused = machine.handle(Arrived(now_s, Request(id_, now_s, now_s + budget_s, tiers)))
    return refused or machine.handle(Decoded(now_s, id_))


def dispatched(actions: list[Action]) -> list[Dispatch]:
    return [action for action in actions if isinstance(action, Dispatch)]


@pytest.mark.parametrize(
    ("budget_s", "tier"), [(10.0, 2), (0.41, 2), (0.39, 1), (0.21, 1), (0.19, 0), (0.11, 0)]
)
def test_an_idle_machine_gives_the_most_accurate_tier_that_fits(budget_s: float, tier: int) -> None:
    assert dispatched(arrive(scheduler(), 1, 0.0, budget_s)) == [Dispatch(0, tier, (1,))]


def test_a_budget_below_the_fastest_allowed_tier_is_refused_on_arrival() -> None:
    [refuse] = scheduler().handle(Arrived(0.0, Request(1, 0.0, 0.05, ALL)))
    assert isinstance(refuse, Refuse)
    assert refuse.why == "budget"
    assert refuse.needed_s == pytest.approx(0.1)
    [refuse] = scheduler().handle(Arrived(0.0, Request(1, 0.0, 0.3, (2,))))  # pinned
    assert isinstance(refuse, Refuse)
    assert refuse.needed_s == pytest.approx(0.4)


def test_the_queue_is_ordered_by_deadline_not_by_arrival() -> None:
    machine = scheduler(max_batch=1)
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.1, 8.0)
    arrive(machine, 3, 0.2, 3.0)
    assert dispatched(machine.handle(Done(0.4, 0, 0.4)))[0].ids == (3,)
    assert dispatched(machine.handle(Done(0.8, 0, 0.4)))[0].ids == (2,)


def test_a_batch_forms_while_the_device_is_busy() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    for id_ in (2, 3, 4):
        assert not dispatched(arrive(machine, id_, 0.1, 9.0))
    assert dispatched(machine.handle(Done(0.4, 0, 0.4))) == [Dispatch(0, 2, (2, 3, 4))]


def test_a_batch_never_makes_its_first_deadline_late() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0, (2,))  # busy until 0.4
    arrive(machine, 2, 0.0, 0.9, (2,))  # at 0.4 there are 0.5 s left: room for 3 on the full tier
    for id_ in range(3, 9):
        arrive(machine, id_, 0.0, 9.0, (2,))
    [dispatch] = dispatched(machine.handle(Done(0.4, 0, 0.4)))
    assert dispatch.ids == (2, 3, 4)


def test_max_batch_bounds_a_batch() -> None:
    machine = scheduler(max_batch=2)
    for id_ in range(4):
        arrive(machine, id_, 0.0, 9.0)
    assert len(dispatched(machine.handle(Done(0.4, 0, 0.4)))[0].ids) == 2


def test_requests_with_other_tiers_do_not_share_a_batch() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.0, 8.0, (0,))
    arrive(machine, 3, 0.0, 8.5, (2,))
    arrive(machine, 4, 0.0, 9.0, (0,))
    assert dispatched(machine.handle(Done(0.4, 0, 0.4))) == [Dispatch(0, 0, (2, 4))]
    assert dispatched(machine.handle(Done(0.6, 0, 0.2))) == [Dispatch(0, 2, (3,))]


def test_waiting_eats_the_budget_and_lowers_the_tier() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0, (2,))
    arrive(machine, 2, 0.0, 0.65)  # would fit the full tier now; at 0.4 only 0.25 s are left
    assert dispatched(machine.handle(Done(0.4, 0, 0.4))) == [Dispatch(0, 1, (2,))]


def test_load_that_leaves_no_tier_in_time_is_refused_at_once_with_the_drain_time() -> None:
    machine = scheduler(max_batch=1)
    arrive(machine, 1, 0.0, 9.0, (2,))  # busy until 0.4
    arrive(machine, 2, 0.0, 0.55, (0,))  # will run 0.4 to 0.5
    [refuse] = arrive(machine, 3, 0.0, 0.58, (0,))
    assert isinstance(refuse, Refuse)
    assert refuse.why == "load"
    assert refuse.retry_after_s == pytest.approx(0.5)
    assert not any(isinstance(a, Refuse) for a in arrive(machine, 4, 0.0, 0.75, (0,)))


def test_a_slow_moment_is_not_told_as_an_impossible_budget() -> None:
    machine = scheduler()
    for i in range(30):  # four times slower than measured
        arrive(machine, i, 3.0 * i, 90.0, (0,))
        machine.handle(Done(3.0 * i + 0.4, 0, 0.4))
    actions = machine.handle(Arrived(90.0, Request(99, 90.0, 90.2, (0,))))
    assert not any(isinstance(action, Refuse) and action.why == "budget" for action in actions)


def test_time_lost_before_the_queue_expires_and_does_not_blame_the_load() -> None:
    machine = scheduler()
    assert machine.handle(Arrived(0.0, Request(1, 0.0, 0.3, ALL))) == []
    assert machine.handle(Decoded(0.25, 1)) == [Expire(1)]


def test_more_requests_than_the_limit_are_refused() -> None:
    machine = scheduler(queue_limit=2)
    for id_ in range(4):
        actions = arrive(machine, id_, 0.0, 90.0)
    [refuse] = actions
    assert isinstance(refuse, Refuse)
    assert refuse.why == "full"


def test_what_can_no_longer_be_met_expires_by_timer_and_never_runs() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0, (0,))  # expected to end at 0.1, and does not
    [wake] = [a for a in arrive(machine, 2, 0.0, 0.3) if isinstance(a, WakeAt)]
    assert wake.at_s == pytest.approx(0.2, abs=0.01)  # 0.3 less the fastest tier's 0.1
    assert machine.handle(Timer(wake.at_s)) == [Expire(2)]
    assert not dispatched(machine.handle(Done(5.0, 0, None)))


def test_who_left_is_not_run() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.0, 9.0)
    machine.handle(Arrived(0.0, Request(3, 0.0, 9.0, ALL)))  # still decoding
    machine.handle(Left(0.1, 2))
    machine.handle(Left(0.1, 3))
    assert machine.handle(Decoded(0.2, 3)) == []
    assert not dispatched(machine.handle(Done(0.4, 0, 0.4)))
    assert machine.waiting == 0


def test_a_failed_batch_frees_its_device_and_teaches_nothing() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.0, 9.0)
    assert dispatched(machine.handle(Done(3.0, 0, None))) == [Dispatch(0, 2, (2,))]


def test_several_devices_share_one_queue() -> None:
    machine = scheduler(devices=2)
    assert dispatched(arrive(machine, 1, 0.0, 9.0))[0].device == 0
    assert dispatched(arrive(machine, 2, 0.0, 9.0))[0].device == 1
    assert not dispatched(arrive(machine, 3, 0.0, 9.0))
    assert dispatched(machine.handle(Done(0.3, 1, 0.3))) == [Dispatch(1, 2, (3,))]


def test_a_policy_may_wait() -> None:
    class Patient(Greedy):
        def choose(self, situation: Situation) -> Run | Wait:
            return Wait(0.5) if situation.now_s < 0.5 else super().choose(situation)

    machine = Scheduler(Patient(), Latency(LINES, spread=1.0))
    [wake] = arrive(machine, 1, 0.0, 9.0)
    assert isinstance(wake, WakeAt)
    assert wake.at_s == pytest.approx(0.5, abs=0.01)
    assert dispatched(machine.handle(Timer(wake.at_s))) == [Dispatch(0, 2, (1,))]


def simulate(seed: int) -> tuple[list[Event], list[list[Action]], dict[int, str]]:
    """500 requests at about the fastest tier's capacity; what happened to each."""
    draw = random.Random(seed)
    machine, events, log, fate = scheduler(queue_limit=50), list[Event](), list[list[Action]](), {}
    agenda: list[tuple[float, int, Event]] = []
    time_s = 0.0
    for id_ in range(500):
        time_s += draw.expovariate(20)
        tiers = draw.choice([ALL, ALL, (0,), (1, 2), (2,)])
        request = Request(id_, time_s, time_s + draw.choice([0.05, 0.3, 0.8, 5.0]), tiers)
        agenda.append((time_s, len(agenda), Arrived(time_s, request)))
        agenda.append((time_s + 0.01, len(agenda), Decoded(time_s + 0.01, id_)))
        if draw.random() < 0.05:
            agenda.append((time_s + 0.05, len(agenda), Left(time_s + 0.05, id_)))
    wake_at_s: float | None = None
    while agenda:
        agenda.sort(key=lambda entry: entry[:2])
        if wake_at_s is not None and wake_at_s <= agenda[0][0]:
            event: Event = Timer(wake_at_s)
            wake_at_s = None
        else:
            event = agenda.pop(0)[2]
        events.append(event)
        log.append(machine.handle(event))
        if isinstance(event, Left):
            fate.setdefault(event.id, "left")
        for action in log[-1]:
            match action:
                case Dispatch(tier=tier, ids=ids):
                    seconds = LINES[tier].at(len(ids)) * draw.uniform(0.9, 1.3)
                    end_s = event.now_s + seconds
                    agenda.append((end_s, len(events) + 10_000, Done(end_s, 0, seconds)))
                    for id_ in ids:
                        assert fate.setdefault(id_, "ran") == "ran"
                case Refuse(id=id_) | Expire(id=id_):
                    assert fate.setdefault(id_, "refused") == "refused"
                case WakeAt(at_s=at_s):
                    wake_at_s = at_s
    return events, log, fate


@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_lost_and_nobody_answered_twice(seed: int) -> None:
    _, _, fate = simulate(seed)
    assert sorted(fate) == list(range(500))
    assert {"ran", "refused", "left"} == set(fate.values())


def test_the_same_events_give_the_same_actions() -> None:
    events, log, _ = simulate(7)
    replayed = scheduler(queue_limit=50)
    assert [replayed.handle(event) for event in events] == log
