"""Early drop; on the fastest tier a batch takes 0.09 s and 0.01 s per image."""

import pytest

from pcae_serve.scheduling.policies.base import Run, SchedulerView, Wait
from pcae_serve.scheduling.policies.early_drop import EarlyDrop
from pcae_serve.scheduling.policies.fixed import Fixed
from pcae_serve.scheduling.policies.greedy import Greedy
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import MOST, TIER_TABLE, ids, view, waiting


def nexus() -> EarlyDrop:
    return EarlyDrop(Fixed(TIER_TABLE, "fast"))


@pytest.mark.parametrize(
    ("budgets_s", "most", "dropped", "served"),
    [
        pytest.param([0.11, 0.5, 0.5, 0.5], MOST, [0], [1, 2, 3], id="four-take-0.13-s"),
        # with the first one dropped, three take 0.12 s
        pytest.param([0.115, 0.125, 0.5, 0.5], MOST, [0], [1, 2, 3], id="fewer-take-less"),
        pytest.param([0.135, 0.2, 0.2, 0.2], MOST, [], [0, 1, 2, 3], id="all-in-time"),
        pytest.param(  # eight take 0.17 s
            [0.12] * 5 + [0.5] * 40, 8, [0, 1, 2, 3, 4], list(range(5, 13)), id="full-batch"
        ),
        pytest.param([0.05, 0.06], MOST, [], [0], id="none-in-time:the-inner-choice"),
    ],
)
def test_requests_that_a_full_batch_makes_late_are_dropped(
    budgets_s: list[float], most: int, dropped: list[int], served: list[int]
) -> None:
    run = nexus().choose(view(waiting(*budgets_s), most=most))
    assert isinstance(run, Run)
    assert ([request.id for request in run.dropped], ids(run)) == (dropped, served)


def test_a_request_that_does_not_allow_the_tier_is_neither_run_nor_dropped() -> None:
    pinned = Request(9, 0.0, 0.2, (1, 2))
    run = nexus().choose(view([*waiting(0.101, 0.5), pinned]))
    assert isinstance(run, Run)
    assert ([request.id for request in run.dropped], ids(run)) == ([0], [1])


@pytest.mark.parametrize(
    ("budgets_s", "tier", "dropped"), [([0.45, 0.5], 2, 0), ([0.12, *[0.5] * 20], 0, 1)]
)
def test_around_greedy_a_cheaper_tier_comes_before_a_drop(
    budgets_s: list[float], tier: int, dropped: int
) -> None:
    run = EarlyDrop(Greedy()).choose(view(waiting(*budgets_s)))
    assert isinstance(run, Run)
    assert (run.tier, len(run.dropped)) == (tier, dropped)


@pytest.mark.parametrize(
    ("policy", "name"), [(nexus(), "nexus:fast"), (EarlyDrop(Greedy()), "greedy+drop")]
)
def test_name(policy: EarlyDrop, name: str) -> None:
    assert policy.name == name


class _Inner:
    name = "inner"

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, int]] = []

    def choose(self, view: SchedulerView) -> Wait:
        return Wait(view.now_s + 1)

    def observe(self, run: Run, seconds: float, late: int) -> None:
        self.seen.append((run.tier, seconds, late))


def test_the_inner_policy_may_wait_and_learns_from_its_batches() -> None:
    inner = _Inner()
    policy = EarlyDrop(inner)
    assert policy.choose(view(waiting(0.01))) == Wait(1)
    policy.observe(Run(1, tuple(waiting(1.0))), 0.3, 1)
    assert inner.seen == [(1, 0.3, 1)]
