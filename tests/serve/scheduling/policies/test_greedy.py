import pytest

from pcae_serve.scheduling.policies.greedy import Greedy
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import ids, linear, load, view, waiting


@pytest.mark.parametrize(("budget_s", "tier"), [(0.41, 2), (0.39, 1), (0.19, 0), (0.11, 0)])
def test_the_most_accurate_tier_that_fits(budget_s: float, tier: int) -> None:
    assert Greedy().choose(view(waiting(budget_s))).tier == tier


def test_what_was_waited_is_gone_from_the_budget() -> None:
    assert Greedy().choose(view(waiting(0.5), now_s=0.2)).tier == 1


def test_the_promise_counts_and_not_the_median() -> None:
    latency = linear((0.0, 0.1), (0.0, 0.2), tail=1.5)
    run = Greedy().choose(view(waiting(0.29, tiers=(0, 1)), latency=latency))
    assert run.tier == 0  # the other takes 0.2 s at the median, and 0.3 s promised


def test_a_longer_queue_pushes_the_choice_down() -> None:
    tiers = [Greedy().choose(view(waiting(*[0.45] * n))).tier for n in (1, 2, 4, 12)]
    assert tiers == [2, 2, 1, 1]  # 0.40, 0.44, then 0.24 and 0.40 s


def test_all_who_wait_run_where_the_head_has_the_time() -> None:
    run = Greedy().choose(view(waiting(0.25, 0.3, 9.0)))
    assert run.tier == 1
    assert ids(run) == [0, 1, 2]


def test_only_those_who_allow_the_tier_come_along() -> None:
    others = [Request(7, 0.0, 9.0, (0,)), Request(8, 0.0, 9.0, (1, 2))]
    assert ids(Greedy().choose(view(waiting(0.25) + others))) == [0, 8]


def test_where_all_are_too_many_the_fastest_takes_as_many_as_the_head_has_time_for() -> None:
    run = Greedy().choose(view(waiting(*[0.125] * 9)))
    assert run.tier == 0
    assert ids(run) == [0, 1, 2]  # 0.12 s


@pytest.mark.parametrize("allowed", [(0, 1, 2), (1, 2), (2,)])
def test_what_cannot_be_met_runs_on_the_fastest_allowed_tier(allowed: tuple[int, ...]) -> None:
    run = Greedy().choose(view(waiting(0.01, 9.0, tiers=allowed)))
    assert run.tier == allowed[0]
    assert ids(run) == [0]


def test_load_is_not_seen() -> None:
    assert Greedy().choose(view(waiting(9.0), arrivals=load(1000.0))).tier == 2
