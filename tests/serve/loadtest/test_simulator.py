import numpy as np
import pytest

from pcae_serve.loadtest.simulator import Draw, End, Outcome, draw, simulate
from pcae_serve.scheduling.events import (
    Action,
    Arrived,
    BatchAccounted,
    Dispatch,
    Done,
    Event,
    Reject,
    Remove,
)
from pcae_serve.scheduling.latency import Seconds
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.scheduling.scheduler import Scheduler
from tests.support.scheduler_views import ALL, LINES, TIER_TABLE, linear

POINTS = [{b: Seconds(o + b * i, 1.2 * (o + b * i)) for b in (1, 32)} for o, i in LINES]


class Recorder:
    """An observer that records every event with its actions."""

    def __init__(self) -> None:
        self.events: list[tuple[Event, list[Action]]] = []

    def __call__(self, event: Event, actions: list[Action]) -> None:
        self.events.append((event, list(actions)))

    @property
    def actions(self) -> list[Action]:
        return [action for _, actions in self.events for action in actions]


def scheduler(spec: str = "greedy", devices: int = 1) -> Scheduler:
    return Scheduler(create(spec, TIER_TABLE), linear(*LINES, tail=1.2), devices=devices)


def run(
    seed: int,
    *,
    rate: float = 60.0,
    spec: str = "greedy",
    devices: int = 1,
    decode_s: float = 0.0,
    host_s: float = 0.0,
    seconds: Draw | None = None,
    recorder: Recorder | None = None,
) -> Outcome:
    """Simulate 300 requests of three budgets."""
    generator = np.random.default_rng(seed)
    times_s = np.cumsum(generator.exponential(1 / rate, 300))
    budgets_s = generator.choice([0.25, 0.8, 4.0], 300)
    seconds = seconds or draw(POINTS, 32, seed)
    return simulate(
        times_s,
        budgets_s,
        scheduler(spec, devices),
        seconds,
        ALL,
        decode_s=decode_s,
        host_s=host_s,
        observer=recorder,
    )


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(("decode_s", "host_s"), [(0.0, 0.0), (0.02, 0.0), (0.02, 0.004)])
@pytest.mark.parametrize("rate", [5.0, 200.0])
def test_every_request_ends_exactly_once(
    rate: float, decode_s: float, host_s: float, devices: int
) -> None:
    recorder = Recorder()
    outcome = run(
        3, rate=rate, decode_s=decode_s, host_s=host_s, devices=devices, recorder=recorder
    )
    ended = [a.id for a in recorder.actions if isinstance(a, Reject | Remove)]
    ended += [id_ for a in recorder.actions if isinstance(a, Dispatch) for id_ in a.ids]
    assert sorted(ended) == list(range(300))
    ran = (outcome.end == End.IN_TIME) | (outcome.end == End.LATE)
    assert ((outcome.tier >= 0) == ran).all()
    late = outcome.end_s > outcome.arrival_s + outcome.budget_s
    assert (late[ran] == (outcome.end[ran] == End.LATE)).all()
    assert (outcome.end_s >= outcome.arrival_s).all()


@pytest.mark.parametrize(
    ("spec", "end"), [("nexus:fastest", End.DROPPED), ("fixed:fastest", End.EXPIRED)]
)
def test_requests_that_the_policy_removes_are_dropped_others_expire(spec: str, end: End) -> None:
    outcome = run(3, rate=200.0, spec=spec, recorder=(recorder := Recorder()))
    removed = [action for action in recorder.actions if isinstance(action, Remove)]
    ends = [End.DROPPED if action.why == "dropped" else End.EXPIRED for action in removed]
    assert end in ends
    assert outcome.end[[action.id for action in removed]].tolist() == ends


def test_events_come_in_the_order_of_their_times() -> None:
    run(4, devices=2, decode_s=0.01, recorder=(recorder := Recorder()))
    times_s = [event.now_s for event, _ in recorder.events]
    assert times_s == sorted(times_s)
    assert sum(isinstance(event, Arrived) for event, _ in recorder.events) == 300


def test_a_seed_gives_the_same_outcome_again() -> None:
    first, again, other = run(5), run(5), run(6)
    for name in ("arrival_s", "end", "tier", "end_s"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.busy_s, first.late_s, first.batches) == (
        again.busy_s,
        again.late_s,
        again.batches,
    )
    assert not np.array_equal(first.end_s, other.end_s)


@pytest.mark.parametrize("devices", [1, 3])
def test_what_was_spent_adds_up_to_the_busy_time(devices: int) -> None:
    outcome = run(7, devices=devices, recorder=(recorder := Recorder()))
    spent = [action for action in recorder.actions if isinstance(action, BatchAccounted)]
    assert outcome.busy_s == pytest.approx(sum(s.seconds for s in spent))
    assert [s.batch for s in spent if devices == 1] == (outcome.batches if devices == 1 else [])
    assert sum(s.batch for s in spent) == sum(outcome.batches)
    assert sum(s.late for s in spent) == (outcome.end == End.LATE).sum()
    assert outcome.late_s <= outcome.busy_s <= devices * outcome.span_s


def test_arrivals_delay_the_batch_in_progress_if_they_share_its_core() -> None:
    def ends(*times_s: float, budget_s: float = 9.0) -> tuple[list[float], list[float]]:
        count, recorder = len(times_s), Recorder()
        outcome = simulate(
            np.array(times_s),
            np.full(count, budget_s),
            scheduler(),
            lambda tier, batch: 0.1,
            (0,),
            host_s=0.01,
            observer=recorder,
        )
        took_s = [
            e.seconds for e, _ in recorder.events if isinstance(e, Done) and e.seconds is not None
        ]
        return outcome.end_s.tolist(), took_s

    # its own 10 ms, then two arrivals during the batch, which run together afterwards
    end_s, took_s = ends(0.0, 0.05, 0.118)
    assert end_s == pytest.approx([0.13, 0.23, 0.23])
    assert took_s == pytest.approx([0.13, 0.1])  # what the latency model learns from
    assert ends(0.0, 1.0)[0] == pytest.approx([0.11, 1.11])


def test_a_device_that_slows_to_half_is_followed_within_20_batches() -> None:
    ran, slow_from, recorder = [0], 50, Recorder()

    def halves(tier: int, batch: int) -> float:
        ran[0] += 1
        overhead_s, image_s = LINES[tier]
        return (overhead_s + batch * image_s) * (2 if ran[0] > slow_from else 1)

    # one at a time, 0.6 s each: enough for the full tier, and later for the one below it
    simulate(np.arange(150.0), np.full(150, 0.6), scheduler(), halves, ALL, observer=recorder)
    batches = [action for action in recorder.actions if isinstance(action, BatchAccounted)]
    before, change, after = batches[:50], batches[50:70], batches[70:]
    assert [(b.tier, b.late) for b in before] == [(2, 0)] * 50
    assert 0 < sum(b.late for b in change) < 10
    assert [(b.tier, b.late) for b in after] == [(1, 0)] * 80


def test_drawn_seconds_have_the_profiles_median_and_p99() -> None:
    seconds = draw(POINTS, 32, seed=1)
    drawn = np.array([seconds(1, 8) for _ in range(20_000)])
    median = 0.18 + 8 * 0.02
    assert np.median(drawn) == pytest.approx(median, rel=0.01)
    assert np.quantile(drawn, 0.99) == pytest.approx(1.2 * median, rel=0.02)


def test_no_requests() -> None:
    outcome = simulate(np.array([]), np.array([]), scheduler(), draw(POINTS, 32, 0), ALL)
    assert (outcome.busy_s, outcome.span_s, outcome.batches) == (0.0, 0.0, [])


def test_callers_share_the_devices_by_weight() -> None:
    count = 1000
    times_s = np.linspace(0.0, count * 2.5e-3, count)  # twice what the device can do
    scheduler = Scheduler(
        create("greedy", TIER_TABLE), linear((0.0, 0.005)), max_batch=32, weights={"heavy": 3.0}
    )
    callers = ["heavy" if i % 2 else "light" for i in range(count)]
    budgets_s = np.full(count, 0.2)
    outcome = simulate(times_s, budgets_s, scheduler, lambda _, n: n * 0.005, (0,), callers=callers)
    served = outcome.end == End.IN_TIME
    late = np.arange(count) > count // 2  # once shares act
    light, heavy = served[0::2] & late[0::2], served[1::2] & late[1::2]
    assert heavy.sum() / light.sum() == pytest.approx(3.0, rel=0.25)
