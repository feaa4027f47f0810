"""The scheduler on its own; test_scheduler_invariants.py has what holds for every policy."""

from typing import Any

import pytest

from pcae_serve.scheduling.background import RECHECK_S
from pcae_serve.scheduling.events import (
    Action,
    Arrived,
    BatchAccounted,
    ClientLeft,
    Decoded,
    Dispatch,
    Done,
    Reject,
    Remove,
    SetTimer,
    StartTask,
    TaskSubmitted,
    TierDisabled,
    Timer,
)
from pcae_serve.scheduling.policies.base import Run, SchedulerView, Wait
from pcae_serve.scheduling.policies.greedy import Greedy
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from tests.support.scheduler_views import ALL, LINES, linear


def scheduler(**options: Any) -> Scheduler:
    """Seconds for one image on the three tiers: 0.1, 0.2, 0.4; ten more cost as much again."""
    return Scheduler(Greedy(), linear(*LINES), **options)


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


def spent(actions: list[Action]) -> BatchAccounted:
    [only] = [action for action in actions if isinstance(action, BatchAccounted)]
    return only


@pytest.mark.parametrize(
    ("budget_s", "tier"), [(10.0, 2), (0.41, 2), (0.39, 1), (0.21, 1), (0.19, 0), (0.11, 0)]
)
def test_an_idle_machine_gives_the_most_accurate_tier_that_fits(budget_s: float, tier: int) -> None:
    assert dispatched(arrive(scheduler(), 1, 0.0, budget_s)) == [Dispatch(0, tier, (1,))]


def test_a_budget_below_the_fastest_allowed_tier_is_refused_on_arrival() -> None:
    [refuse] = scheduler().handle(Arrived(0.0, Request(1, 0.0, 0.05, ALL)))
    assert isinstance(refuse, Reject)
    assert refuse.why == "budget"
    assert refuse.needed_s == pytest.approx(0.1)
    [refuse] = scheduler().handle(Arrived(0.0, Request(1, 0.0, 0.3, (2,))))  # pinned
    assert isinstance(refuse, Reject)
    assert refuse.needed_s == pytest.approx(0.4)


def test_what_is_refused_before_its_body_would_be_refused_on_arrival() -> None:
    """The check changes nothing, and never refuses what an arrival would not."""
    machine = scheduler(queue_limit=12)
    refused = list[str]()
    for id_ in range(36):
        budget_s = (0.05, 0.12, 9.0)[id_ % 3]
        request = Request(id_, 0.0, budget_s, ALL)
        before = machine.waiting
        early = [machine.early_refusal(request, 0.0) for _ in range(2)]
        assert machine.waiting == before
        actions = machine.handle(Arrived(0.0, request))
        assert early[0] is None or early[0] == actions[0]
        assert early[0] == early[1]
        refused += [action.why for action in actions if isinstance(action, Reject)]
    assert set(refused) == {"budget", "load", "full"}


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
    assert isinstance(refuse, Reject)
    assert refuse.why == "load"
    assert refuse.retry_after_s == pytest.approx(0.5)
    assert not any(isinstance(a, Reject) for a in arrive(machine, 4, 0.0, 0.75, (0,)))


def test_one_who_would_push_another_past_its_deadline_is_refused() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0, (0,))  # busy until 0.1
    arrive(machine, 2, 0.0, 0.58, (0,))
    [refuse] = arrive(machine, 3, 0.0, 0.55, (2,))
    assert isinstance(refuse, Reject)
    assert refuse.why == "load"


def test_a_slow_moment_is_not_told_as_an_impossible_budget() -> None:
    machine = scheduler()
    for i in range(30):  # four times slower than measured
        arrive(machine, i, 3.0 * i, 90.0, (0,))
        machine.handle(Done(3.0 * i + 0.4, 0, 0.4))
    actions = machine.handle(Arrived(90.0, Request(99, 90.0, 90.2, (0,))))
    assert not any(isinstance(action, Reject) and action.why == "budget" for action in actions)


def test_time_lost_before_the_queue_expires_and_does_not_blame_the_load() -> None:
    machine = scheduler()
    assert machine.handle(Arrived(0.0, Request(1, 0.0, 0.3, ALL))) == []
    assert machine.handle(Decoded(0.25, 1)) == [Remove(1, "expired")]


def test_more_requests_than_the_limit_are_refused() -> None:
    machine = scheduler(queue_limit=2)
    for id_ in range(4):
        actions = arrive(machine, id_, 0.0, 90.0)
    [refuse] = actions
    assert isinstance(refuse, Reject)
    assert refuse.why == "full"


def test_what_can_no_longer_be_met_expires_by_timer_and_never_runs() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0, (0,))  # expected to end at 0.1, and does not
    [wake] = [a for a in arrive(machine, 2, 0.0, 0.3) if isinstance(a, SetTimer)]
    assert wake.at_s == pytest.approx(0.2, abs=0.01)  # 0.3 less the fastest tier's 0.1
    assert machine.handle(Timer(wake.at_s)) == [Remove(2, "expired")]
    assert not dispatched(machine.handle(Done(5.0, 0, None)))


class DropHead(Greedy):
    """Drops the most urgent request and runs all others."""

    def choose(self, view: SchedulerView) -> Run:
        head, *others = view.queue.by_deadline
        return Run(0, tuple(others), dropped=(head,)) if others else super().choose(view)


def drop_head(deadline_s: float) -> list[Action]:
    """Return the actions once a batch ends late, with two requests waiting."""
    machine = Scheduler(DropHead(), linear(*LINES))
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.0, deadline_s)
    arrive(machine, 3, 0.0, deadline_s + 0.01)
    return machine.handle(Done(0.415, 0, 0.415))[1:]  # expected at 0.4


def test_a_request_that_the_policy_drops_is_removed() -> None:
    # 0.415 s + 0.11 s for both is too late for the first, and after it the second is late
    assert drop_head(0.52)[:2] == [Remove(2, "dropped"), Dispatch(0, 0, (3,))]


def test_a_policy_cannot_drop_a_request_that_has_time_left() -> None:
    assert drop_head(0.53)[0] == Dispatch(0, 0, (2, 3))


def test_a_client_may_leave_at_any_point_of_its_requests_life() -> None:
    machine = scheduler(max_batch=2)
    arrive(machine, 1, 0.0, 9.0)  # runs at once
    for id_ in (2, 3, 4, 5):
        arrive(machine, id_, 0.0, 9.0 + id_)
    machine.handle(Arrived(0.0, Request(6, 0.0, 9.0, ALL)))
    assert machine.waiting == 5
    machine.handle(ClientLeft(0.1, 6))  # before it is decoded
    machine.handle(ClientLeft(0.1, 3))  # in the queue
    machine.handle(ClientLeft(0.1, 1))  # while it runs
    assert machine.waiting == 3
    assert not dispatched(machine.handle(Decoded(0.2, 6)))
    actions = machine.handle(Done(0.4, 0, 0.4))
    assert spent(actions) == BatchAccounted(0, 2, 1, 0.4, late=0, cancelled=1)
    assert dispatched(actions) == [Dispatch(0, 2, (2, 4))]
    assert machine.handle(ClientLeft(0.5, 1)) == []  # long gone
    machine.handle(ClientLeft(0.5, 4))
    machine.handle(ClientLeft(0.6, 4))  # twice
    actions = machine.handle(Done(0.9, 0, 0.44))
    assert spent(actions).cancelled == 1
    assert dispatched(actions) == [Dispatch(0, 2, (5,))]
    assert machine.waiting == 0


def test_late_answers_are_counted_and_not_those_that_nobody_waits_for() -> None:
    machine = scheduler()
    for id_, budget_s in ((1, 9.0), (2, 1.0), (3, 1.0), (4, 9.0)):
        arrive(machine, id_, 0.0, budget_s, (0,))
    assert dispatched(machine.handle(Done(0.1, 0, 0.1)))[0].ids == (2, 3, 4)
    machine.handle(ClientLeft(1.1, 3))
    assert spent(machine.handle(Done(2.1, 0, 2.0))) == BatchAccounted(
        0, 0, 3, 2.0, late=1, cancelled=1
    )


def test_a_failed_batch_frees_its_device_and_teaches_nothing() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.0, 9.0)
    actions = machine.handle(Done(3.0, 0, None))
    assert dispatched(actions) == [Dispatch(0, 2, (2,))]
    assert spent(actions).seconds == 0.0


def test_several_devices_share_one_queue() -> None:
    machine = scheduler(devices=2)
    assert dispatched(arrive(machine, 1, 0.0, 9.0))[0].device == 0
    assert dispatched(arrive(machine, 2, 0.0, 9.0))[0].device == 1
    assert not dispatched(arrive(machine, 3, 0.0, 9.0))
    assert dispatched(machine.handle(Done(0.3, 1, 0.3))) == [Dispatch(1, 2, (3,))]


def test_a_batch_that_no_device_was_given_is_told() -> None:
    with pytest.raises(ValueError, match="device 0"):
        scheduler().handle(Done(0.1, 0, 0.1))


def test_a_policy_may_wait() -> None:
    class Patient(Greedy):
        def choose(self, view: SchedulerView) -> Run | Wait:  # type: ignore[override]
            return Wait(0.5) if view.now_s < 0.5 else super().choose(view)

    machine = Scheduler(Patient(), linear(*LINES))
    [wake] = arrive(machine, 1, 0.0, 9.0)
    assert isinstance(wake, SetTimer)
    assert wake.at_s == pytest.approx(0.5, abs=0.01)
    assert dispatched(machine.handle(Timer(wake.at_s))) == [Dispatch(0, 2, (1,))]


class Moody:
    """A policy that cannot choose while it is in a bad mood; else the head on the best tier."""

    name = "moody"

    def __init__(self) -> None:
        self.bad = True

    def choose(self, view: SchedulerView) -> Run:
        if self.bad:
            raise ZeroDivisionError
        head = view.queue.by_deadline[0]
        return Run(head.tiers[-1], (head,))

    def observe(self, run: Run, seconds: float, late: int) -> None:
        pass


def test_a_policy_that_fails_costs_nobody_an_answer_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = Moody()
    machine = Scheduler(policy, linear(*LINES))
    assert dispatched(arrive(machine, 1, 0.0, 9.0, tiers=(1, 2))) == [Dispatch(0, 1, (1,))]
    arrive(machine, 2, 0.0, 8.0)
    arrive(machine, 3, 0.0, 7.0)
    assert dispatched(machine.handle(Done(0.2, 0, 0.2))) == [Dispatch(0, 0, (3,))]
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert "moody" in caplog.text
    policy.bad = False
    assert dispatched(machine.handle(Done(0.3, 0, 0.1))) == [Dispatch(0, 2, (2,))]
    assert machine.policy_failed


def test_a_closed_tier_is_left_to_others_and_who_has_none_is_told() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 5.0)
    arrive(machine, 2, 0.0, 5.0, (2,))
    arrive(machine, 3, 0.0, 5.0, (1, 2))
    assert machine.handle(TierDisabled(0.1, 2))[0] == Remove(2, "failed")
    actions = machine.handle(Done(0.4, 0, 0.4))
    assert dispatched(actions) == [Dispatch(0, 1, (3,))]


def test_an_errand_waits_until_nobody_else_does() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 5.0)
    arrive(machine, 2, 0.0, 5.0)
    assert StartTask(0, 7) not in machine.handle(TaskSubmitted(0.3, 7, 0.01))
    assert dispatched(machine.handle(Done(0.4, 0, 0.4))) == [Dispatch(0, 2, (2,))]
    assert machine.handle(Done(0.8, 0, 0.4))[-1] == StartTask(0, 7)
    assert not dispatched(arrive(machine, 3, 0.805, 5.0))  # the device is not free
    assert dispatched(machine.handle(Done(0.81, 0, None))) == [Dispatch(0, 2, (3,))]


def test_an_errand_waits_for_who_is_still_at_the_decoder() -> None:
    machine = scheduler()
    machine.handle(Arrived(0.0, Request(1, 0.0, 5.0, ALL)))
    [wake] = machine.handle(TaskSubmitted(0.01, 7, 0.01))
    assert isinstance(wake, SetTimer)  # a better moment may come without an event
    assert wake.at_s == pytest.approx(0.01 + RECHECK_S, abs=0.001)
    assert dispatched(machine.handle(Decoded(0.05, 1))) == [Dispatch(0, 2, (1,))]
    assert StartTask(0, 7) in machine.handle(Done(0.45, 0, 0.4))


def test_a_long_errand_waits_where_it_would_make_expected_requests_late() -> None:
    """Five requests a second with budgets of 0.3 s: nobody misses 10 ms, but half a second."""

    def begun(seconds: float, budget_s: float) -> list[float]:
        machine, begun_s = scheduler(), list[float]()
        for id_ in range(100):
            now_s = 0.2 * id_
            for action in machine.handle(TaskSubmitted(now_s, 0, seconds)) if id_ == 40 else []:
                begun_s += [now_s] * isinstance(action, StartTask)
            if begun_s:
                return begun_s
            [dispatch] = dispatched(arrive(machine, id_, now_s, budget_s))
            done_s = now_s + 0.1 * (1 + dispatch.tier)
            for action in machine.handle(Done(done_s, 0, 0.1 * (1 + dispatch.tier))):
                begun_s += [done_s] * isinstance(action, StartTask)
        return begun_s

    assert begun(0.01, 0.3) == [8.0]
    assert begun(0.5, 5.0) == [8.0]
    at_s = begun(0.5, 0.12)[0]
    assert 10.0 <= at_s < 10.5  # its patience


@pytest.mark.parametrize(
    ("waited_s", "spare_s", "first"),
    [
        (0.9, 9.0, "request"),
        (1.1, 9.0, "task"),  # 50 ms are 5 % of a second
        (1.1, 0.04, "request"),  # who waits has no 50 ms
        (4.9, 0.04, "request"),
        (5.1, 0.04, "task"),  # 1 % of a device is theirs in any case
    ],
)
def test_errands_have_a_share_of_a_device_that_is_never_free(
    waited_s: float, spare_s: float, first: str
) -> None:
    machine = scheduler(max_batch=1)
    arrive(machine, 1, 0.0, 9.0)
    machine.handle(TaskSubmitted(6.0 - waited_s, 7, 0.05))
    arrive(machine, 2, 5.9, 0.1 + 0.1 + spare_s)
    actions = machine.handle(Done(6.0, 0, 0.4))
    assert isinstance(actions[1], StartTask if first == "task" else Dispatch)


def test_errands_are_done_in_turn_with_a_rest_between() -> None:
    machine = scheduler(max_batch=1)
    arrive(machine, 1, 0.0, 9.0)
    for id_ in (7, 8):
        machine.handle(TaskSubmitted(0.01, id_, 0.05))
    arrive(machine, 2, 5.9, 9.0)
    arrive(machine, 3, 5.9, 9.0)
    assert StartTask(0, 7) in machine.handle(Done(6.0, 0, 0.4))
    assert dispatched(machine.handle(Done(6.05, 0, None))) == [Dispatch(0, 2, (2,))]
    assert StartTask(0, 8) in machine.handle(Done(7.1, 0, 0.4))  # 5 % of the time since


@pytest.mark.parametrize(("now_s", "refused"), [(4.9, False), (5.1, True)])
def test_admission_reckons_with_an_errand_that_is_due(now_s: float, refused: bool) -> None:
    machine = scheduler(max_batch=1)
    arrive(machine, 1, 0.0, 9.0)
    machine.handle(TaskSubmitted(0.0, 7, 3.0))
    told = machine.handle(Arrived(now_s, Request(2, now_s, now_s + 2.0, ALL)))
    assert [isinstance(action, Reject) and action.why for action in told] == ["load"] * refused


def test_a_long_errand_is_followed_by_as_long_a_rest() -> None:
    machine = scheduler(max_batch=1)
    machine.handle(TaskSubmitted(0.0, 0, 0.05))
    arrive(machine, 1, 0.01, 9.0)
    machine.handle(TaskSubmitted(0.02, 1, 0.001))
    arrive(machine, 2, 0.03, 9.0)
    assert dispatched(machine.handle(Done(0.05, 0, None))) == [Dispatch(0, 2, (1,))]
    assert dispatched(machine.handle(Done(0.9, 0, 0.4))) == [Dispatch(0, 2, (2,))]
    arrive(machine, 3, 0.95, 9.0)
    assert StartTask(0, 1) in machine.handle(Done(1.3, 0, 0.4))
