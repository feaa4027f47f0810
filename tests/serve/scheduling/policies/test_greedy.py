"""Greedy; one image takes 0.1, 0.2 and 0.4 s, a further one of the batch a tenth of that."""

import pytest

from pcae_serve.scheduling.policies.greedy import Greedy
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import ids, linear, load, view, waiting


@pytest.mark.parametrize(
    ("budgets_s", "tier", "served"),
    [
        pytest.param([0.41], 2, [0], id="best-that-fits"),
        pytest.param([0.39], 1, [0], id="middle"),
        pytest.param([0.19], 0, [0], id="fastest"),
        pytest.param([0.45] * 2, 2, [0, 1], id="queue-of-2-in-0.44-s"),
        pytest.param([0.45] * 4, 1, [0, 1, 2, 3], id="a-longer-queue-lowers-the-tier"),
        pytest.param([0.25, 0.3, 9.0], 1, [0, 1, 2], id="the-whole-queue"),
        pytest.param([0.125] * 9, 0, [0, 1, 2], id="too-many:as-many-as-fit"),
        pytest.param([0.01, 9.0], 0, [0], id="too-late:alone-on-the-fastest"),
    ],
)
def test_choice(budgets_s: list[float], tier: int, served: list[int]) -> None:
    run = Greedy().choose(view(waiting(*budgets_s)))
    assert (run.tier, ids(run)) == (tier, served)


def test_time_spent_waiting_is_subtracted_from_the_budget() -> None:
    assert Greedy().choose(view(waiting(0.5), now_s=0.2)).tier == 1


def test_p99_counts_and_not_the_median() -> None:
    latency = linear((0.0, 0.1), (0.0, 0.2), tail=1.5)
    run = Greedy().choose(view(waiting(0.29, tiers=(0, 1)), latency=latency))
    assert run.tier == 0  # tier 1 takes 0.2 s at the median and 0.3 s at p99


def test_only_requests_that_allow_the_tier_are_served() -> None:
    others = [Request(7, 0.0, 9.0, (0,)), Request(8, 0.0, 9.0, (1, 2))]
    assert ids(Greedy().choose(view(waiting(0.25) + others))) == [0, 8]


@pytest.mark.parametrize("allowed", [(1, 2), (2,)])
def test_the_fastest_allowed_tier_serves_a_late_request(allowed: tuple[int, ...]) -> None:
    assert Greedy().choose(view(waiting(0.01, 9.0, tiers=allowed))).tier == allowed[0]


def test_the_arrival_rate_is_ignored() -> None:
    assert Greedy().choose(view(waiting(9.0), arrivals=load(1000.0))).tier == 2
