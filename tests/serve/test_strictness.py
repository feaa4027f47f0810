"""Admission learns how much it underestimates the work that it has taken."""

import pytest

from pcae_serve.admission import STRICTEST, Strictness
from pcae_serve.latency import Latency, Seconds
from pcae_serve.policies.greedy import Greedy
from pcae_serve.queue import Request
from pcae_serve.scheduler import Arrived, Decoded, Done, Expire, Refuse, Scheduler, Timer


def test_it_rises_with_requests_taken_in_vain_and_falls_with_answers_in_time() -> None:
    strictness = Strictness()
    strictness.in_vain(5)
    high = strictness.times
    assert high > 1.05
    strictness.in_time(50)
    assert 1.0 <= strictness.times < high


def test_it_stays_within_bounds() -> None:
    strictness = Strictness()
    strictness.in_vain(10_000)
    assert strictness.times == pytest.approx(STRICTEST)
    strictness.in_time(100_000)
    assert strictness.times == 1.0


def machine_with_waiting(lost: int) -> Scheduler:
    """Busy, seven more in the queue; `lost` were taken in vain before."""
    latency = Latency([{1: Seconds(0.1, 0.1), 8: Seconds(0.8, 0.8)}], 8)
    machine = Scheduler(Greedy(), latency, max_batch=1, queue_limit=99)
    for i in range(lost):
        begin_s = 10.0 * i
        for id_ in (1000 + 2 * i, 1001 + 2 * i):  # the first one hangs, the second expires
            machine.handle(Arrived(begin_s, Request(id_, begin_s, begin_s + 0.5, (0,))))
            machine.handle(Decoded(begin_s, id_))
        actions = machine.handle(Timer(begin_s + 0.45))
        assert [type(action) for action in actions] == [Expire]
        machine.handle(Done(begin_s + 5.0, 0, None))
    now_s = 10.0 * lost
    for id_ in range(8):
        machine.handle(Arrived(now_s, Request(id_, now_s, now_s + 1.05, (0,))))
        machine.handle(Decoded(now_s, id_))
    return machine


@pytest.mark.parametrize(("lost", "refused"), [(0, False), (15, True)])
def test_those_taken_in_vain_make_the_next_refusal_come_at_once(lost: int, refused: bool) -> None:
    machine = machine_with_waiting(lost)
    now_s = 10.0 * lost
    actions = machine.handle(Arrived(now_s, Request(99, now_s, now_s + 1.1, (0,))))
    assert any(isinstance(action, Refuse) for action in actions) == refused
