"""Figures of a replay from recorded responses."""

import numpy as np
import pytest

from pcae_serve.loadtest.load_generator import Responses
from pcae_serve.loadtest.replay import Answer, Run, max_overlap
from pcae_serve.loadtest.simulator import End
from pcae_serve.loadtest.workload import Workload
from pcae_serve.scheduling.tiers import TierTable


def test_a_lagging_load_generator_cannot_make_a_server_look_fast() -> None:
    load = Workload(np.array([0.0, 1.0]), np.array([0.5, 0.5]))
    responses = Responses(
        np.array([0.9, np.nan]), np.array([1.0, np.nan]), np.array([200, 0], np.int16), [b""] * 2
    )
    run = Run("poisson", 1.0, 0, load, responses, [Answer("full", True, 0), None], None, {})
    outcome = run.outcome(TierTable(("fast", "full"), (0.6, 0.8)))
    # 0.1 s after it was sent, 1.0 s after it was due
    assert outcome.end.tolist() == [End.LATE, End.FAILED]
    assert outcome.end_s[0] - outcome.arrival_s[0] == 1.0
    assert run.lag_s[0] == 0.9


@pytest.mark.parametrize(
    ("times_s", "budgets_s", "most"),
    [([0.0, 1.0, 2.0, 9.0], [1.5, 1.5, 1.5, 1.0], 2), ([0.0] * 5, [1.0] * 5, 5)],
)
def test_max_overlap(times_s: list[float], budgets_s: list[float], most: int) -> None:
    assert max_overlap(Workload(np.array(times_s), np.array(budgets_s))) == most
