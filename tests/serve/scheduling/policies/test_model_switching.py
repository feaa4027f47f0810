"""Model-Switching; a budget of 1 s holds two batches of 3 in 0.48 s, or of 16 in 0.50 s.

The best tier sustains 6.25 requests per second, the middle one 32.
"""

import pytest

from pcae_serve.scheduling.policies.base import SchedulerView
from pcae_serve.scheduling.policies.model_switching import PATIENCE, ModelSwitching
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import TIER_TABLE, ids, load, view, waiting

CALM, NEARLY, BUSY = 5.0, 6.0, 7.0


def at(rate: float, budgets_s: tuple[float, ...] = (1.0,), devices: int = 1) -> SchedulerView:
    return view(waiting(1.0), arrivals=load(rate, budgets_s=budgets_s), devices=devices)


@pytest.mark.parametrize(
    ("now", "tier"),
    [
        *((at(rate), 2) for rate in (0.0, 6.0)),
        *((at(rate), 1) for rate in (7.0, 31.0)),
        *((at(rate), 0) for rate in (33.0, 70.0, 999.0)),
        (at(12.0, devices=2), 2),  # devices share the load
        (at(14.0, devices=2), 1),
        (at(6.0, (1.0, 0.5)), 1),  # half of the answers late is worse than less accuracy for all
        (at(6.0, (0.5, *[1.0] * 31)), 2),  # 0.90 of 31 in 32, against 0.85 of all
    ],
)
def test_the_load_determines_the_tier(now: SchedulerView, tier: int) -> None:
    assert ModelSwitching(TIER_TABLE).choose(now).tier == tier


@pytest.mark.parametrize(
    ("rates", "tiers"),
    [
        pytest.param([CALM, BUSY, 33.0], [2, 1, 0], id="down-at-once"),
        pytest.param([BUSY] + [CALM] * PATIENCE, [1] * PATIENCE + [2], id="up-with-patience"),
        pytest.param(
            ([BUSY] + [CALM] * (PATIENCE - 1)) * 2, [1] * 2 * PATIENCE, id="a-burst-restarts-it"
        ),
        pytest.param(
            [BUSY] + [NEARLY] * 3 * PATIENCE, [1] * (1 + 3 * PATIENCE), id="not-near-the-threshold"
        ),
    ],
)
def test_switching(rates: list[float], tiers: list[int]) -> None:
    policy = ModelSwitching(TIER_TABLE)
    assert [policy.choose(at(rate)).tier for rate in rates] == tiers


def test_a_request_that_does_not_allow_the_tier_gets_the_nearest() -> None:
    now = view([Request(0, 0.0, 1.0, (1, 2))], arrivals=load(33.0))
    assert ModelSwitching(TIER_TABLE).choose(now).tier == 1


def test_the_batch_is_limited_by_the_earliest_deadline() -> None:
    run = ModelSwitching(TIER_TABLE).choose(view(waiting(0.45, *[9.0] * 9)))
    assert (run.tier, ids(run)) == (2, [0, 1])  # 0.44 s
