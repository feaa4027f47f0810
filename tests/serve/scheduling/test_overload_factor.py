"""Admission learns how much it underestimates the work that it has taken."""

import pytest

from pcae_serve.scheduling.admission import MAX_FACTOR, OverloadFactor
from pcae_serve.scheduling.events import Arrived, Decoded, Done, Reject, Remove, Timer
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.greedy import Greedy
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler


def test_it_rises_with_requests_taken_in_vain_and_falls_with_answers_in_time() -> None:
    overload_factor = OverloadFactor()
    overload_factor.missed(5)
    high = overload_factor.times
    assert high > 1.05
    overload_factor.in_time(50)
    assert 1.0 <= overload_factor.times < high


def test_it_stays_within_bounds() -> None:
    overload_factor = OverloadFactor()
    overload_factor.missed(10_000)
    assert overload_factor.times == pytest.approx(MAX_FACTOR)
    overload_factor.in_time(100_000)
    assert overload_factor.times == 1.0


def offer(machine: Scheduler, ids: range, now_s: float, budget_s: float) -> list[int]:
    """Ids of those refused."""
    refused = []
    for id_ in ids:
        actions = machine.handle(Arrived(now_s, Request(id_, now_s, now_s + budget_s, (0,))))
        refused += [action.id for action in actions if isinstance(action, Reject)]
        machine.handle(Decoded(now_s, id_))
    return refused


def hanging(lost: int) -> Scheduler:
    """One image takes 0.1 s, but the first batch hangs, and `lost` were taken in vain behind it."""
    latency = Latency([{1: Seconds(0.1, 0.1), 8: Seconds(0.8, 0.8)}], 8)
    machine = Scheduler(Greedy(), latency, max_batch=1, queue_limit=99)
    assert not offer(machine, range(1 + lost), 0.0, 2.0)
    expired = [a for a in machine.handle(Timer(1.95)) if isinstance(a, Remove)]
    assert len(expired) == lost
    return machine


@pytest.mark.parametrize(("lost", "refused"), [(0, []), (15, [107])])
def test_those_taken_in_vain_make_the_next_refusal_come_at_once(
    lost: int, refused: list[int]
) -> None:
    machine = hanging(lost)
    # eight of 0.1 s fit into 1.06 s, eight of 0.1 s x 1.02^15 do not
    assert offer(machine, range(100, 108), 3.0, 1.06) == refused


@pytest.mark.parametrize(("done_s", "refused"), [(1.9, []), (2.1, [107])])
def test_answers_that_come_late_were_taken_in_vain(done_s: float, refused: list[int]) -> None:
    latency = Latency([{1: Seconds(0.1, 0.1), 15: Seconds(0.11, 0.11)}], 15)
    machine = Scheduler(Greedy(), latency, max_batch=15)
    offer(machine, range(1), 0.0, 9.0)
    offer(machine, range(1, 16), 0.0, 2.0)
    machine.handle(Done(0.1, 0, 0.1))  # the fifteen run
    offer(machine, range(50, 51), 0.2, 9.0)  # somebody waits: nothing has been caught up with
    machine.handle(Done(done_s, 0, 0.11))
    offer(machine, range(100, 107), 3.0, 9.0)  # 0.1 s and a bit in one batch
    assert offer(machine, range(107, 108), 3.0, 0.12) == refused


def test_answers_in_time_make_it_forget() -> None:
    machine = hanging(15)
    offer(machine, range(20, 22), 2.0, 9.0)
    machine.handle(Done(2.5, 0, None))
    for i in range(600):  # there is always one that waits
        now_s = 2.6 + 0.1 * i
        machine.handle(Done(now_s, 0, 0.1))
        offer(machine, range(1000 + i, 1001 + i), now_s, 9.0)
    # one runs and one waits; seven more make 0.9 s
    assert offer(machine, range(100, 107), 62.5, 0.95) == []


def test_who_was_decoded_too_late_was_not_taken_in_vain() -> None:
    machine = hanging(0)
    for id_ in range(1, 16):
        machine.handle(Arrived(0.0, Request(id_, 0.0, 2.0, (0,))))
        assert machine.handle(Decoded(1.95, id_)) == [Remove(id_, "expired")]
    assert offer(machine, range(100, 108), 3.0, 1.06) == []


#: One of 0.1 s runs and seven wait: 0.8 s, and 0.1 s + 0.7 s x 1.02^15 where it is strict.
TIGHT_S = 0.95


def test_a_machine_that_has_caught_up_begins_anew() -> None:
    machine = hanging(15)
    machine.handle(Done(2.5, 0, None))
    assert offer(machine, range(100, 108), 3.0, TIGHT_S) == []


def test_while_somebody_is_being_decoded_nothing_is_caught_up_with() -> None:
    machine = hanging(15)
    machine.handle(Arrived(2.0, Request(50, 2.0, 99.0, (0,))))
    machine.handle(Done(2.5, 0, None))
    assert offer(machine, range(100, 108), 3.0, TIGHT_S) == [107]
