"""Admission alone. 0.1, 0.2 and 0.4 s for one image on the three tiers, a tenth more for others."""

import pytest

from pcae_serve.scheduling.admission import DeviceCapacity, check_admission
from pcae_serve.scheduling.events import RejectReason
from pcae_serve.scheduling.latency import Latency
from pcae_serve.scheduling.request_queue import Queue, Request
from tests.support.scheduler_views import ALL, LATENCY, LINES, MOST, linear

Why = RejectReason | None


def queue(*requests: tuple[float, tuple[int, ...]]) -> Queue:
    """Requests by deadline and allowed tiers."""
    made = Queue()
    for id_, (deadline_s, tiers) in enumerate(requests):
        made.add(Request(id_, 0.0, deadline_s, tiers))
    return made


def why_refused(
    budget_s: float,
    tiers: tuple[int, ...] = ALL,
    *,
    waiting: Queue | None = None,
    decoding: Queue | None = None,
    free_in_s: float = 0.0,
    latency: Latency = LATENCY,
    now_s: float = 0.0,
    decode_s: float = 0.0,
    ready_s: float = 0.0,
) -> Why:
    machine = DeviceCapacity(now_s, latency.forecast(0.0), MOST, 1, free_in_s)
    request = Request(99, 0.0, budget_s, tiers, decode_s=decode_s, ready_s=ready_s)
    return check_admission(
        request, latency.idle(tiers[0]), machine, (waiting or Queue(), decoding or Queue())
    )


@pytest.mark.parametrize(("tiers", "needed_s"), [(ALL, 0.1), ((1, 2), 0.2), ((2,), 0.4)])
def test_a_budget_below_the_fastest_allowed_tier_is_not_the_loads_fault(
    tiers: tuple[int, ...], needed_s: float
) -> None:
    assert why_refused(needed_s - 0.001, tiers, free_in_s=5.0) == "budget"
    assert why_refused(needed_s + 0.001, tiers) is None


def test_on_an_idle_machine_what_a_slow_moment_makes_late_is_not_the_loads_fault() -> None:
    slow = linear(*LINES)
    for _ in range(30):
        slow.observe(0, 1, 0.5, 0.0)
    assert why_refused(0.2, latency=slow) == "expired"


def test_decoding_counts_even_on_an_idle_machine() -> None:
    assert why_refused(0.51, decode_s=0.4, ready_s=0.4) is None
    assert why_refused(0.49, decode_s=0.4, ready_s=0.4) == "budget"


@pytest.mark.parametrize("free_in_s", [0.0, 5.0])
def test_time_that_the_upload_took_is_not_the_loads_fault(free_in_s: float) -> None:
    late, in_time = 0.2001, 0.1999 if not free_in_s else 0.0
    assert why_refused(0.7, now_s=late, decode_s=0.4, free_in_s=free_in_s) == "expired"
    why = why_refused(0.7, now_s=in_time, decode_s=0.4, free_in_s=free_in_s)
    assert why == ("load" if free_in_s else None)


@pytest.mark.parametrize("free_in_s", [0.0, 0.1])
def test_a_request_cannot_run_before_the_decoders_get_to_it(free_in_s: float) -> None:
    assert why_refused(1.09, decode_s=0.1, ready_s=1.0, free_in_s=free_in_s) == "load"
    assert why_refused(1.11, decode_s=0.1, ready_s=1.0, free_in_s=free_in_s) is None


@pytest.mark.parametrize(("budget_s", "why"), [(0.49, "load"), (0.51, None)])
def test_who_cannot_be_done_after_the_batch_that_runs_is_refused(budget_s: float, why: Why) -> None:
    assert why_refused(budget_s, free_in_s=0.4) == why


@pytest.mark.parametrize(("budget_s", "why"), [(0.415, "load"), (0.425, None)])
def test_those_due_earlier_go_first_in_one_batch_with_the_newcomer(
    budget_s: float, why: Why
) -> None:
    ahead = queue((0.410, ALL), (0.405, ALL))  # with a third one a batch of 0.12
    assert why_refused(budget_s, waiting=ahead, free_in_s=0.3) == why


@pytest.mark.parametrize("due_s", [0.45, 0.30])
def test_it_does_not_matter_whether_they_are_decoded_yet(due_s: float) -> None:
    decoding = queue((due_s, (1,)))  # 0.2 on a tier of its own
    assert why_refused(0.5, (0,), decoding=decoding, free_in_s=0.3) == "load"
    assert why_refused(0.7, (0,), decoding=decoding, free_in_s=0.0) is None


@pytest.mark.parametrize(("other_s", "why"), [(0.58, "load"), (0.62, None)])
def test_a_newcomer_does_not_push_those_behind_it_past_their_deadlines(
    other_s: float, why: Why
) -> None:
    behind = queue((other_s, (0,)))  # 0.1 of its own, after 0.1 of wait and the newcomer's 0.4
    assert why_refused(0.55, (2,), waiting=behind, free_in_s=0.1) == why


def test_of_a_long_queue_behind_it_a_sample_is_looked_at() -> None:
    tight = queue(*[(0.5 + 0.001 * i, (0,)) for i in range(200)])
    assert why_refused(0.45, (2,), waiting=tight) == "load"
    loose = queue(*[(50 + 0.001 * i, (0,)) for i in range(200)])
    assert why_refused(0.45, (2,), waiting=loose) is None


def test_work_is_counted_in_batches_and_told_as_the_time_to_come_back() -> None:
    full = queue(*[(90.0 + i, ALL) for i in range(50)])

    def drain_s(most: int, devices: int = 1) -> float:
        machine = DeviceCapacity(0.0, LATENCY.forecast(0.0), most, devices, 0.0)
        return machine.drain_s((full, Queue()))

    assert drain_s(most=1) == pytest.approx(50 * 0.1)
    assert drain_s(most=32) < 1.0
    assert drain_s(most=1, devices=2) == pytest.approx(25 * 0.1)


def test_a_promise_is_needed_not_a_hope() -> None:
    scattering = linear(*LINES, tail=1.5)
    assert why_refused(0.52, free_in_s=0.4, latency=scattering) == "load"  # typically done by 0.5
    assert why_refused(0.56, free_in_s=0.4, latency=scattering) is None
