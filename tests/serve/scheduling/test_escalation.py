"""What second looks gain, and how much of it a share of a device buys."""

import pytest

from pcae_serve.scheduling.escalation import Escalation, Escalations, Step
from tests.support.scheduler_views import LATENCY

STEPS = (Step(0.2, 0.1, 0.3), Step(0.5, 0.2, 0.1))
FORECAST = LATENCY.forecast(0.0)  # 0.1, 0.2 and 0.4 s for one image


@pytest.mark.parametrize(
    ("margin", "gain"), [(0.0, 0.3), (0.2, 0.3), (0.21, 0.1), (0.5, 0.1), (0.51, 0.0), (1.0, 0.0)]
)
def test_the_gain_is_that_of_the_margins_step(margin: float, gain: float) -> None:
    assert Escalation(0, 1, STEPS).gain(margin) == gain


def test_only_allowed_tiers_that_gain_are_returned() -> None:
    known = Escalations([Escalation(0, 1, STEPS[:1]), Escalation(0, 2, STEPS)])
    assert known.gains(0, 0.1, (0, 1, 2)) == {1: 0.3, 2: 0.3}
    assert known.gains(0, 0.4, (0, 1, 2)) == {2: 0.1}
    assert known.gains(0, 0.1, (0, 1)) == {1: 0.3}
    assert known.gains(1, 0.1, (0, 1, 2)) == {}
    assert known
    assert not Escalations([])


@pytest.mark.parametrize(
    ("rate", "gain", "price_per_s"),
    [
        (0.0, 0.05, 0.0),
        (1.0, 0.05, 0.0),  # 0.1 + 0.3 * 0.2 s a second: enough for all
        (6.25, 0.1 * 0.3 + 0.2 * 0.1 * 0.25 / 0.25, 0.0),  # 0.625 + 0.125 + 0.25: exactly enough
        (8.0, 0.1 * 0.3 + 0.2 * 0.1 * 0.04 / 0.32, 0.1 / 0.2),  # 0.2 left, 0.16 for the first step
        (10.0, 0.0, 0.3 / 0.2),  # nothing is left
        (20.0, 0.0, 0.3 / 0.2),
    ],
)
def test_a_plan_spends_what_first_looks_leave(rate: float, gain: float, price_per_s: float) -> None:
    known = Escalations([Escalation(0, 1, STEPS)])
    plan = known.plan(0, (0, 1, 2), FORECAST, rate, 0.1)
    assert plan is not None
    assert plan.second == 1
    assert plan.gain == pytest.approx(gain)
    assert plan.price_per_s == pytest.approx(price_per_s)


def test_a_plan_takes_the_tier_that_gains_most() -> None:
    better = (Step(0.2, 0.1, 0.4), Step(0.5, 0.2, 0.2))
    known = Escalations([Escalation(0, 1, STEPS), Escalation(0, 2, better)])
    idle, busy = (known.plan(0, (0, 1, 2), FORECAST, rate, 0.1) for rate in (0.1, 8.0))
    assert idle is not None
    assert idle.second == 2
    assert busy is not None
    assert busy.second == 1  # twice as many images for the same time
    assert known.plan(0, (0,), FORECAST, 1.0, 0.1) is None
    assert known.plan(2, (0, 1, 2), FORECAST, 1.0, 0.4) is None
