"""Which keep ratios a step runs: ends, ramps and probabilities."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pcae_training.budget_choice import BudgetChoice
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.sample_rng import SampleRng


def choice(**changes: Any) -> BudgetChoice:
    """The choice of a run with these flags."""
    return FinetuneSettings(data="x", out=Path("y"), **changes).budget_choice


def visits(choice: BudgetChoice, progress: float) -> list[list[float]]:
    return [choice.draw(SampleRng(0, step, 4), progress) for step in range(200)]


def test_both_ends_are_always_visited_and_all_between_sometimes() -> None:
    budgets = (1.0, 0.9, 0.7, 0.5, 0.4)
    steps = visits(choice(budgets=budgets, between=2), 1.0)
    assert all(step[0] == 1.0 and step[-1] == 0.4 and len(step) == 4 for step in steps)
    assert all(step == sorted(set(step), reverse=True) for step in steps)
    for inner in budgets[1:-1]:
        assert 90 < sum(inner in step for step in steps) < 180  # two of three
    assert visits(choice(budgets=budgets, between=9), 1.0) == [list(budgets)] * 200


def test_one_budget_per_step() -> None:
    steps = visits(choice(budgets=(1.0, 0.6), sampling="one"), 1.0)
    assert 70 < steps.count([1.0]) < 130
    assert steps.count([1.0]) + steps.count([0.6]) == 200


@pytest.mark.parametrize("sampling", ["sandwich", "one"])
def test_the_ramp_holds_small_budgets_back(sampling: Any) -> None:
    budgets = (1.0, 0.8, 0.6)
    made = choice(budgets=budgets, sampling=sampling)
    seen = {
        progress: {ratio for step in visits(made, progress) for ratio in step}
        for progress in (0.0, 0.09, 0.2, 0.3, 0.36, 1.0)
    }
    assert seen[0.0] == seen[0.09] == {1.0}
    assert seen[0.3] == {1.0, 0.8}  # the line is at 0.68
    assert seen[0.36] == seen[1.0] == set(budgets)


def test_the_ramp_of_one_ratio_takes_few_steps() -> None:
    made = choice(keep=0.6)
    ratios = [made.draw(SampleRng(0, 0, 4), i / 100) for i in range(101)]
    assert ratios == sorted(ratios, reverse=True)
    assert {ratio for step in ratios for ratio in step} == {1.0, 0.9, 0.8, 0.7, 0.6}


def test_probabilities_of_a_budget_a_step() -> None:
    made = choice(budgets=(1.0, 0.8, 0.6), sampling="one", budget_probabilities="1.0=0.5,0.6=0.4")
    steps = visits(made, 1.0)
    assert 80 < steps.count([1.0]) < 120
    assert 60 < steps.count([0.6]) < 100
    assert 8 < steps.count([0.8]) < 35
    assert made.odds((1.0, 0.8)) == pytest.approx([5 / 6, 1 / 6])  # while the ramp allows no other
    costs = {1.0: 10.0, 0.8: 5.0, 0.6: 1.0}
    assert made.macs(costs, 1.0) == pytest.approx(0.5 * 10 + 0.1 * 5 + 0.4 * 1)
    assert made.macs(costs, 0.0) == 10.0


def test_probabilities_between_the_ends() -> None:
    budgets = (1.0, 0.9, 0.8, 0.6)
    steps = visits(choice(budgets=budgets, budget_probabilities="0.9=0.75"), 1.0)
    assert all(step[0] == 1.0 and step[-1] == 0.6 and len(step) == 3 for step in steps)
    assert sum(0.9 in step for step in steps) > 170  # 0.75 against a third of 0.25


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.5=0.1", "0.5 is not a budget of this run (1.0, 0.6)"),
        ("1.0=0.7,0.6=0.7", "they sum to 1.4, not to 1"),
        ("1.0=0.3,0.6=0.3", "they sum to 0.6, not to 1"),
        ("1.0:0.3", "must be RATIO=NUMBER, separated by commas, not '1.0:0.3'"),
        ("1.0=-1", "greater than or equal to 0"),
    ],
)
def test_probabilities_that_cannot_be(given: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        choice(budgets=(1.0, 0.6), budget_probabilities=given)
    assert message in str(caught.value)
