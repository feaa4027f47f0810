"""The life of a request with a first answer, in the scheduler."""

from typing import Any

import pytest

from pcae_serve.scheduling.escalation import Escalation, Escalations, Step
from pcae_serve.scheduling.events import (
    Action,
    Answer,
    Arrived,
    ClientLeft,
    Decoded,
    DeviceLost,
    Dispatch,
    Done,
    LooksEnded,
    SetTimer,
    TierDisabled,
    Timer,
)
from pcae_serve.scheduling.policies.base import Run, SchedulerView, Wait
from pcae_serve.scheduling.policies.fixed import Fixed
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler
from tests.support.scheduler_views import ALL, LINES, TIER_TABLE, linear

#: 0.1, 0.2 and 0.4 s for one image. Up to a margin of 0.1, a second look gains 0.3 on the third
#: tier and 0.2 on the second; up to 0.5, a tenth of that.
STEPS = {2: 0.3, 1: 0.2}
LOOKS = Escalations(
    [
        Escalation(0, second, (Step(0.1, 0.1, gain), Step(0.5, 0.4, gain / 10)))
        for second, gain in STEPS.items()
    ]
)


def scheduler(**options: Any) -> Scheduler:
    """First looks run on the first tier."""
    given = {"escalations": LOOKS, **options}
    return Scheduler(Fixed(TIER_TABLE, "fast"), linear(*LINES), **given)


def arrive(
    machine: Scheduler, id_: int, now_s: float, budget_s: float, **more: Any
) -> list[Action]:
    fields: dict[str, Any] = {"tiers": ALL, "max_looks": 2} | more
    request = Request(id_, now_s, now_s + budget_s, **fields)
    assert machine.handle(Arrived(now_s, request)) == []
    return machine.handle(Decoded(now_s, id_))


def answered(machine: Scheduler, margin: float = 0.05, budget_s: float = 9.0, **more: Any) -> Any:
    """Return the actions after the first answer of request 1, at 0.1 s."""
    assert Dispatch(0, 0, (1,)) in arrive(machine, 1, 0.0, budget_s, **more)
    return machine.handle(Done(0.1, 0, 0.1, ((1, margin),)))


def of(actions: list[Action], *kinds: type) -> list[Action]:
    return [action for action in actions if isinstance(action, kinds)]


def test_an_unsure_answer_runs_again_on_the_tier_that_gains_most() -> None:
    machine = scheduler()
    assert of(answered(machine), Answer, Dispatch) == [Dispatch(0, 2, (1,))]
    assert machine.waiting == 0  # admission does not count it
    assert of(machine.handle(Done(0.5, 0, 0.4)), Answer, Dispatch) == []


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({}, 0.6),  # sure
        ({"max_looks": 1}, 0.05),
        ({"tiers": (0,)}, 0.05),
        ({"budget_s": 0.29}, 0.05),  # 0.19 s left, and the next tier takes 0.2
    ],
)
def test_the_first_answer_is_sent_at_once(more: dict[str, Any], margin: float) -> None:
    assert of(answered(scheduler(), margin, **more), Answer, Dispatch) == [Answer(1)]


def test_the_second_look_is_on_a_tier_that_the_budget_and_the_request_allow() -> None:
    assert of(answered(scheduler(), budget_s=0.45), Dispatch) == [Dispatch(0, 1, (1,))]
    assert of(answered(scheduler(), tiers=(0, 1)), Dispatch) == [Dispatch(0, 1, (1,))]


def test_response_time_has_a_price() -> None:
    """A gain of 0.3 or 0.2 is not worth 0.4 or 0.2 s at 1.1 a second; a gain of 0.2 is at 0.9."""
    assert of(answered(scheduler(price_per_s=1.1)), Answer, Dispatch) == [Answer(1)]
    assert of(answered(scheduler(price_per_s=0.9)), Answer, Dispatch) == [Dispatch(0, 1, (1,))]


def test_first_looks_go_first() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.0, 9.0)
    actions = machine.handle(Done(0.1, 0, 0.1, ((1, 0.05),)))
    assert of(actions, Answer, Dispatch) == [Dispatch(0, 0, (2,))]
    actions = machine.handle(Done(0.2, 0, 0.1, ((2, 0.6),)))
    assert of(actions, Answer, Dispatch) == [Answer(2), Dispatch(0, 2, (1,))]


def test_no_second_look_runs_while_a_policy_waits_with_a_queue() -> None:
    class Patient(Fixed):
        def choose(self, view: SchedulerView) -> Run | Wait:  # type: ignore[override]
            return Wait(0.6) if view.now_s < 0.6 and view.now_s > 0.05 else super().choose(view)

    latency = linear(*LINES)
    machine = Scheduler(Patient(TIER_TABLE, "fast"), latency, escalations=LOOKS)
    arrive(machine, 1, 0.0, 9.0)
    arrive(machine, 2, 0.0, 9.0)
    actions = machine.handle(Done(0.1, 0, 0.1, ((1, 0.05),)))
    assert of(actions, Answer, Dispatch) == []
    assert of(machine.handle(Timer(0.61)), Dispatch) == [Dispatch(0, 0, (2,))]


def test_the_larger_gain_goes_first_and_similar_ones_share_a_batch() -> None:
    machine = scheduler()
    for id_ in (1, 2, 3):
        arrive(machine, id_, 0.0, 9.0)
    machine.handle(Done(0.1, 0, 0.1, ((1, 0.3),)))
    actions = machine.handle(Done(0.3, 0, 0.2, ((2, 0.05), (3, 0.05))))
    [run] = of(actions, Dispatch)
    assert isinstance(run, Dispatch)
    assert run.ids[:2] == (2, 3)


def test_more_images_than_a_batch_holds_run_one_batch_after_the_other() -> None:
    machine = scheduler(max_batch=2)
    for id_ in range(5):
        arrive(machine, id_, 0.0, 90.0)
    now_s, looked, running = 0.0, list[int](), [0]
    for _ in range(9):
        now_s += 1.0
        margins = tuple((id_, 0.05) for id_ in running if id_ not in looked)
        first = now_s < 4
        actions = machine.handle(Done(now_s, 0, 1.0, margins if first else ()))
        batches = of(actions, Dispatch)
        if not batches:
            break
        [batch] = batches
        assert isinstance(batch, Dispatch)
        assert len(batch.ids) <= 2
        running = list(batch.ids)
        looked += [] if batch.tier == 0 else running
    assert sorted(looked) == [0, 1, 2, 3, 4]


def waiting_behind(machine: Scheduler, budget_s: float = 1.0) -> None:
    """Leave request 1 with a first answer, while request 2 runs from 0.1 to 0.2 s."""
    arrive(machine, 1, 0.0, budget_s)
    arrive(machine, 2, 0.0, 9.0)
    actions = machine.handle(Done(0.1, 0, 0.1, ((1, 0.05),)))
    assert of(actions, Answer, Dispatch) == [Dispatch(0, 0, (2,))]


def test_the_first_answer_is_sent_once_no_second_look_can_end_in_time() -> None:
    machine = scheduler()
    waiting_behind(machine)
    # the device is stuck; on the tier in the middle it had to start at 1 - 0.025 - 0.2
    assert of(machine.handle(Timer(0.77)), Answer) == []
    assert of(machine.handle(Timer(0.776)), Answer) == [Answer(1)]
    assert of(machine.handle(Done(0.9, 0, 0.8, ((2, 0.6),))), Answer, Dispatch) == [Answer(2)]


def test_a_timer_is_set_for_the_latest_start_of_a_second_look() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 1.0)
    arrive(machine, 2, 0.0, 9.0)
    [timer] = of(machine.handle(Done(0.1, 0, 0.1, ((1, 0.05),))), SetTimer)
    assert isinstance(timer, SetTimer)
    assert timer.at_s == pytest.approx(0.775, abs=0.001)


def test_a_client_that_left_gets_no_second_look() -> None:
    machine = scheduler()
    waiting_behind(machine)
    assert machine.handle(ClientLeft(0.15, 1)) == []
    assert of(machine.handle(Done(0.2, 0, 0.1)), Answer, Dispatch) == []


def test_a_client_that_leaves_during_its_first_look_gets_no_second_one() -> None:
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    machine.handle(ClientLeft(0.05, 1))
    assert of(machine.handle(Done(0.1, 0, 0.1, ((1, 0.05),))), Answer, Dispatch) == []


def test_no_second_look_starts_after_looks_have_ended() -> None:
    machine = scheduler()
    waiting_behind(machine)
    assert of(machine.handle(LooksEnded(0.15)), Answer, Dispatch) == [Answer(1)]
    actions = machine.handle(Done(0.2, 0, 0.1, ((2, 0.05),)))
    assert of(actions, Answer, Dispatch) == [Answer(2)]


def test_a_tier_that_failed_gives_no_second_look() -> None:
    machine = scheduler()
    waiting_behind(machine)
    assert of(machine.handle(TierDisabled(0.12, 2)), Answer) == []
    assert of(machine.handle(TierDisabled(0.13, 1)), Answer) == [Answer(1)]
    machine = scheduler()
    waiting_behind(machine)
    machine.handle(TierDisabled(0.12, 2))
    actions = machine.handle(Done(0.2, 0, 0.1, ((2, 0.6),)))
    assert of(actions, Answer, Dispatch) == [Answer(2), Dispatch(0, 1, (1,))]


def test_a_lost_device_takes_no_second_look() -> None:
    machine = scheduler()
    waiting_behind(machine)
    assert of(machine.handle(DeviceLost(0.15, 0)), Answer, Dispatch) == []
    assert of(machine.handle(Timer(0.801)), Answer) == [Answer(1)]


def test_a_late_second_look_is_no_missed_deadline() -> None:
    """The first answer was sent in time, so that the scheduler does not call itself overloaded."""
    machine = scheduler()
    answered(machine, budget_s=0.6)
    machine.handle(Done(2.0, 0, 1.9))
    assert machine._overload_factor.times == 1.0


def test_a_second_look_makes_no_accepted_request_late() -> None:
    """Request 2 is being decoded: at 0.35 it has to start, and a second look ends at 0.3 or 0.5."""
    machine = scheduler()
    arrive(machine, 1, 0.0, 9.0)
    second = Request(2, 0.05, 0.45, ALL, decode_s=0.1, ready_s=0.15, max_looks=2)
    assert machine.handle(Arrived(0.05, second)) == []
    actions = machine.handle(Done(0.1, 0, 0.1, ((1, 0.05),)))
    assert of(actions, Answer, Dispatch) in ([Dispatch(0, 1, (1,))], [])
    assert Dispatch(0, 2, (1,)) not in actions
