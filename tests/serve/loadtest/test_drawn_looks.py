"""Simulated answers are as unsure as the calibration says."""

import numpy as np
import pytest

from pcae_serve.loadtest.drawn_looks import CERTAIN, DrawnLooks
from pcae_serve.loadtest.simulator import Outcome
from pcae_serve.scheduling.escalation import Escalation, Step
from pcae_serve.scheduling.tiers import TierTable

STEPS = (Step(0.2, 0.1, 0.3), Step(0.5, 0.2, 0.1))
TABLE = TierTable(("fast", "full"), (0.8, 0.85), escalations=(Escalation(0, 1, STEPS),))
N = 20_000


def test_margins_have_the_shares_of_the_calibration() -> None:
    looks = DrawnLooks(TABLE, N, 0)
    margins = np.array([looks.margin(i, 0) for i in range(N)])
    for margin, share in ((0.2, 0.1), (0.5, 0.2), (CERTAIN, 0.7)):
        assert (margins == margin).mean() == pytest.approx(share, abs=0.01)
    assert {looks.margin(i, 1) for i in range(100)} == {CERTAIN}


def test_a_second_look_adds_its_gain_to_the_first_tiers_accuracy() -> None:
    looks, n = DrawnLooks(TABLE, N, 0), 1000
    unsure = next(i for i in range(n) if looks.margin(i, 0) == 0.2)
    outcome = Outcome(
        np.arange(n, dtype=float), np.ones(n), np.zeros(n, np.int8), np.zeros(n, np.int16),
        np.ones(n), first=np.zeros(n, np.int16),
    )  # fmt: skip
    outcome.tier[unsure] = 1
    accuracy = looks.accuracy(outcome)
    assert accuracy[unsure] == pytest.approx(0.8 + 0.3)
    assert set(np.delete(accuracy, unsure)) == {0.8}


def test_second_looks_raise_accuracy_and_cost_no_answer() -> None:
    from pcae_serve.loadtest import simulation  # a process pool is imported with it
    from pcae_serve.loadtest.platforms import BatchSeconds, Platform, TimedTier

    tiers = tuple(
        TimedTier(name=name, accuracy=a, points=(BatchSeconds(batch=1, p50_s=s, p99_s=s * 1.1),))
        for name, a, s in (("fast", 0.8, 0.004), ("full", 0.85, 0.016))
    )
    platform = Platform(source="test", tiers=tiers, escalations=TABLE.escalations)
    found = {}
    for looks in (1, 2):
        setup = simulation.Setup(platform, "mixed", 1500, 1, 8, 64, 0.0, 0.0, 0.1, looks)
        found[looks] = simulation.run_cell(setup, simulation.Cell("pace", "poisson", 120.0, 0))
    one, two = found[1].figures, found[2].figures
    assert two.effective_accuracy > one.effective_accuracy + 0.005
    assert two.attainment >= one.attainment
