import pytest

from pcae_serve.latency import Latency, Line
from pcae_serve.policies import Request, Situation
from pcae_serve.policies.greedy import Greedy

LATENCY = Latency([Line(0.09, 0.01), Line(0.36, 0.04)], spread=1.0)  # 0.1 s and 0.4 s for one


def situation(*budgets_s: float, tiers: tuple[int, ...] = (0, 1), most: int = 32) -> Situation:
    waiting = [Request(i, 0.0, budget, tiers) for i, budget in enumerate(sorted(budgets_s))]
    return Situation(0.0, waiting, LATENCY, most)


@pytest.mark.parametrize(("budget_s", "tier"), [(0.41, 1), (0.39, 0), (0.11, 0)])
def test_the_most_accurate_tier_that_fits(budget_s: float, tier: int) -> None:
    assert Greedy().choose(situation(budget_s)).tier == tier


def test_nobody_is_served_worse_for_company() -> None:
    run = Greedy().choose(situation(0.2, 0.2, 9.0))
    assert run.tier == 0
    assert [request.id for request in run.requests] == [0, 1]


def test_the_batch_stops_where_its_first_deadline_would_be_missed() -> None:
    assert len(Greedy().choose(situation(*[0.45] * 9)).requests) == 2  # 0.36 + 2 * 0.04 = 0.44
    assert len(Greedy().choose(situation(*[9.0] * 9, most=4)).requests) == 4


def test_what_cannot_be_met_runs_on_the_fastest_allowed_tier() -> None:
    assert Greedy().choose(situation(0.01)).tier == 0
    assert Greedy().choose(situation(0.01, tiers=(1,))).tier == 1
