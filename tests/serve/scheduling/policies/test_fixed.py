"""Fixed; on the fastest tier a batch takes 0.09 s and 0.01 s per image."""

import pytest

from pcae_serve.errors import StartError
from pcae_serve.scheduling.policies.fixed import Fixed
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import TIER_TABLE, ids, load, view, waiting


@pytest.mark.parametrize("budget_s", [0.11, 9.0])
@pytest.mark.parametrize("rate", [0.0, 1000.0])
def test_the_tier_depends_neither_on_the_budget_nor_on_the_load(
    budget_s: float, rate: float
) -> None:
    run = Fixed(TIER_TABLE, "balanced").choose(view(waiting(budget_s), arrivals=load(rate)))
    assert run.tier == 1


@pytest.mark.parametrize(("allowed", "tier"), [((0, 1, 2), 1), ((0, 2), 2), ((2,), 2), ((0,), 0)])
def test_a_request_that_does_not_allow_the_tier_gets_the_nearest(
    allowed: tuple[int, ...], tier: int
) -> None:
    assert Fixed(TIER_TABLE, "balanced").choose(view(waiting(9.0, tiers=allowed))).tier == tier


USEFUL = view(waiting(9.0)).forecast.useful_batch(0)


@pytest.mark.parametrize(
    ("name", "budgets_s", "max_batch", "size"),
    [
        pytest.param("fast", [0.125, *[9.0] * 9], 32, 3, id="earliest-deadline"),
        pytest.param("fast", [9.0] * 9, 4, 4, id="max-batch"),
        pytest.param("fast", [9.0] * 40, 32, USEFUL, id="useful-batch"),
        pytest.param("full", [0.2, 9.0], 32, 1, id="late:alone"),
    ],
)
def test_the_batch_is_limited(name: str, budgets_s: list[float], max_batch: int, size: int) -> None:
    run = Fixed(TIER_TABLE, name).choose(view(waiting(*budgets_s), most=max_batch))
    assert USEFUL < 32
    assert ids(run) == list(range(size))
    assert not run.dropped


def test_a_batch_on_another_tier_contains_only_requests_that_need_it() -> None:
    pinned, free = Request(0, 0.0, 7.0, (2,)), Request(1, 0.0, 8.0, (0, 1, 2))
    other = Request(2, 0.0, 9.0, (1, 2))  # tier 1 is nearer to the fixed one
    same = Request(3, 0.0, 9.0, (2,))
    run = Fixed(TIER_TABLE, "fast").choose(view([pinned, free, other, same]))
    assert (run.tier, ids(run)) == (2, [0, 3])


def test_an_unknown_tier_is_an_error() -> None:
    with pytest.raises(StartError, match="the tiers are fast, balanced, full"):
        Fixed(TIER_TABLE, "slow")
