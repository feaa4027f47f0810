from time import perf_counter

import pytest

from pcae_serve.scheduling.policies.base import Run, SchedulerView, Wait
from pcae_serve.scheduling.policies.early_drop import EarlyDrop
from pcae_serve.scheduling.policies.fixed import Fixed
from pcae_serve.scheduling.policies.greedy import Greedy
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import TIER_TABLE, ids, view, waiting


def nexus(tier_name: str = "fast") -> EarlyDrop:
    return EarlyDrop(Fixed(TIER_TABLE, tier_name))


def dropped(choice: Run | Wait) -> list[int]:
    assert isinstance(choice, Run)
    return [request.id for request in choice.dropped]


def test_a_head_that_the_full_batch_would_be_too_late_for_is_let_go() -> None:
    run = nexus().choose(view(waiting(0.11, 0.5, 0.5, 0.5)))  # four take 0.13 s
    assert dropped(run) == [0]
    assert ids(run) == [1, 2, 3]


def test_a_head_is_kept_where_fewer_left_take_less() -> None:
    # four take 0.13 s, three 0.12: with the first gone the second makes it
    run = nexus().choose(view(waiting(0.115, 0.125, 0.5, 0.5)))
    assert dropped(run) == [0]
    assert ids(run) == [1, 2, 3]


def test_nobody_is_let_go_where_the_full_batch_is_in_time() -> None:
    run = nexus().choose(view(waiting(0.135, 0.2, 0.2, 0.2)))
    assert dropped(run) == []
    assert ids(run) == [0, 1, 2, 3]


def test_the_batch_is_full_where_the_queue_is_long() -> None:
    run = nexus().choose(view(waiting(*[0.12] * 5, *[0.5] * 40), most=8))  # eight take 0.17 s
    assert dropped(run) == [0, 1, 2, 3, 4]
    assert ids(run) == [5, 6, 7, 8, 9, 10, 11, 12]


def test_where_nobody_can_make_it_the_inner_choice_runs() -> None:
    run = nexus().choose(view(waiting(0.05, 0.06)))
    assert dropped(run) == []
    assert ids(run) == [0]


def test_who_does_not_allow_the_tier_is_neither_run_nor_let_go() -> None:
    pinned = Request(9, 0.0, 0.2, (1, 2))
    run = nexus().choose(view([*waiting(0.101, 0.5), pinned]))
    assert dropped(run) == [0]
    assert ids(run) == [1]


def test_around_greedy_only_what_no_tier_can_save_is_dropped() -> None:
    crowd = [0.5] * 20
    run = EarlyDrop(Greedy()).choose(view(waiting(0.45, 0.5)))
    assert isinstance(run, Run)
    assert (run.tier, dropped(run)) == (2, [])
    assert dropped(EarlyDrop(Greedy()).choose(view(waiting(0.12, *crowd)))) == [0]


@pytest.mark.parametrize(
    ("policy", "name"),
    [(nexus(), "nexus:fast"), (EarlyDrop(Greedy()), "greedy+drop")],
    ids=["fixed", "greedy"],
)
def test_names(policy: EarlyDrop, name: str) -> None:
    assert policy.name == name


class _Recorder(Greedy):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, int]] = []

    def observe(self, run: Run, seconds: float, late: int) -> None:
        self.seen.append((run.tier, seconds, late))


def test_the_inner_policy_hears_what_became_of_its_batches() -> None:
    inner = _Recorder()
    EarlyDrop(inner).observe(Run(1, tuple(waiting(1.0))), 0.3, 1)
    assert inner.seen == [(1, 0.3, 1)]


class _Patient(Greedy):
    def choose(self, view: SchedulerView) -> Wait:  # type: ignore[override]
        return Wait(view.now_s + 1)


def test_an_inner_policy_may_wait() -> None:
    assert EarlyDrop(_Patient()).choose(view(waiting(0.01))) == Wait(1)


def test_a_long_queue_is_decided_on_within_100_microseconds() -> None:
    policy, long = nexus(), view(waiting(*[0.12] * 5, *[9.0] * 1000))
    took_s = []
    for _ in range(20):
        began_s = perf_counter()
        policy.choose(long)
        took_s.append(perf_counter() - began_s)
    assert min(took_s) < 100e-6
