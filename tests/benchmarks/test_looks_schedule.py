"""The beam search that knows second looks: against the exact search, and by hand."""

import numpy as np
import pytest

from benchmarks.looks_schedule import Search
from benchmarks.optimal_schedule import best

ACCURACY = (0.8, 0.9)
#: Of batches of 1, 2 and 3 images.
SECONDS = ((0.10, 0.15, 0.20), (0.50, 0.90, 1.30))


def search(
    budgets_s: list[float], gains: list[float], times_s: list[float] | None = None
) -> Search:
    """gains: of each image, on the second tier after the first."""
    n = len(budgets_s)
    of_pair = np.zeros((n, 2, 2))
    of_pair[:, 0, 1] = gains
    arrivals = np.array(times_s or [0.0] * n)
    return Search(arrivals, np.array(budgets_s), ACCURACY, SECONDS, of_pair)


@pytest.mark.parametrize(
    ("budget_s", "gain", "value"),
    [
        (0.61, 0.15, 0.95),  # both looks fit
        (0.59, 0.15, 0.90),  # the better tier alone
        (0.61, 0.05, 0.90),  # a second look gains less than a better first one
        (0.11, 0.15, 0.80),
        (0.09, 0.15, 0.0),
    ],
)
def test_one_image_runs_on_what_is_worth_most(budget_s: float, gain: float, value: float) -> None:
    found = search([budget_s], [gain]).run(8)
    assert found.value == pytest.approx(value)
    assert found.answered == (value > 0)


def test_the_image_that_gains_most_runs_again() -> None:
    """Three first looks take 0.2 s, and one second look 0.5 s."""
    found = search([0.71] * 3, [0.05, 0.3, 0.1]).run(16)
    assert found.value == pytest.approx(3 * 0.8 + 0.3)
    found = search([1.11] * 3, [0.05, 0.3, 0.1]).run(16)
    assert found.value == pytest.approx(3 * 0.8 + 0.4)


def test_a_second_look_waits_for_a_later_first_look() -> None:
    """The second request arrives at 0.1 s with no time to lose; the first one can wait."""
    found = search([0.8, 0.11], [0.15, 0.0], [0.0, 0.1]).run(16)
    assert found.value == pytest.approx(1.75)
    assert found.answered == 2


@pytest.mark.parametrize("seed", range(6))
def test_without_second_looks_it_finds_what_the_exact_search_finds(seed: int) -> None:
    draw = np.random.Generator(np.random.PCG64(seed))
    times_s = np.sort(draw.random(9)) * 1.5
    budgets_s = draw.choice([0.3, 0.7, 2.0], 9)
    known = best(times_s, budgets_s, ACCURACY, SECONDS)
    assert known.optimal
    found = Search(times_s, budgets_s, ACCURACY, SECONDS, np.zeros((9, 2, 2))).run(128)
    assert found.value <= known.value + 1e-9
    assert found.value >= 0.99 * known.value
