"""Arrival statistics, by their public interface."""

import random

import pytest

from pcae_serve.scheduling.arrivals import RATE_OVER, Arrivals


def poisson(rate: float, count: int, budgets_s: tuple[float, ...] = (1.0,)) -> Arrivals:
    """Return Poisson arrivals from time 0, with budgets drawn uniformly."""
    arrivals, draw, now_s = Arrivals(), random.Random(1), 0.0
    for _ in range(count):
        now_s += draw.expovariate(rate)
        arrivals.observe(now_s, draw.choice(budgets_s))
    return arrivals


def regular(rate: float, count: int) -> Arrivals:
    arrivals = Arrivals()
    for i in range(count):
        arrivals.observe(i / rate, 1.0)
    return arrivals


def test_there_is_no_rate_at_first() -> None:
    assert Arrivals().rate(0.0) == 0.0
    arrivals = Arrivals()
    arrivals.observe(0.0, 1.0)
    assert arrivals.rate(0.0) == 0.0


@pytest.mark.parametrize("rate", [2.0, 100.0, 5000.0])
def test_the_rate_is_that_of_the_last_arrivals(rate: float) -> None:
    assert regular(rate, 500).rate(499 / rate) == pytest.approx(rate, rel=0.05)


def test_the_rate_follows_a_change_within_100_requests() -> None:
    arrivals = regular(10.0, 300)
    start_s = 29.9
    for i in range(1, 101):
        arrivals.observe(start_s + i / 1000.0, 1.0)
    assert arrivals.rate(start_s + 0.1) == pytest.approx(1000.0, rel=0.1)


def test_the_rate_falls_without_arrivals() -> None:
    arrivals = regular(100.0, 200)
    assert arrivals.rate(1.99 + 10.0) < 10.0 < arrivals.rate(1.99)


def test_budget_classes_have_shares_and_are_sorted() -> None:
    classes = poisson(100.0, 3000, (0.05, 0.2, 0.2, 1.0)).classes
    budgets_s = [c.budget_s for c in classes]
    assert budgets_s == sorted(budgets_s)
    assert sum(c.share for c in classes) == pytest.approx(1.0, abs=1e-6)
    share = {0.05: 0.25, 0.2: 0.5, 1.0: 0.25}
    for budget_s, expected in share.items():
        found = sum(c.share for c in classes if abs(c.budget_s / budget_s - 1) < 0.2)
        assert found == pytest.approx(expected, abs=0.1)


def test_any_number_of_budgets_gives_few_classes() -> None:
    draw, arrivals = random.Random(2), Arrivals()
    for i in range(2000):
        arrivals.observe(0.01 * i, 10 ** draw.uniform(-3, 2))
    assert 1 <= len(arrivals.classes) <= 10
    assert sum(c.share for c in arrivals.classes) == pytest.approx(1.0, abs=1e-6)


def test_count_within_agrees_with_the_rate() -> None:
    arrivals = poisson(200.0, 3000)
    for seconds in (0.01, 0.1, 1.0):
        mean, variance = arrivals.count_within(seconds)
        assert mean == pytest.approx(200.0 * seconds, rel=0.3)
        if 200.0 * seconds < RATE_OVER:  # the averages run over no more
            assert variance == pytest.approx(200.0 * seconds, rel=0.6)  # of a Poisson process


def test_bursts_have_a_larger_variance_than_regular_arrivals() -> None:
    clusters = Arrivals()
    for i in range(2000):  # eight at once, at the same mean rate
        clusters.observe((i // 8) * 0.08, 1.0)
    assert clusters.count_within(0.05)[1] > regular(100.0, 2000).count_within(0.05)[1] + 1


def test_future_arrivals_are_due_only_after_the_smallest_budget() -> None:
    arrivals = poisson(100.0, 2000, (0.1, 0.5, 2.0))
    assert arrivals.count_due(0.05) == (0.0, 0.0)
    means = [arrivals.count_due(0.02 * i)[0] for i in range(1, 120)]
    assert means == sorted(means)
    assert means[-1] > 10
    deviations = [arrivals.count_due(0.02 * i)[1] for i in range(1, 120)]
    assert all(deviation >= 0 for deviation in deviations)


def test_count_due_after_one_request() -> None:
    arrivals = Arrivals()
    arrivals.observe(0.0, 0.5)
    mean, deviation = arrivals.count_due(1.0)
    assert mean >= 0
    assert deviation >= 0


def test_a_budget_of_zero_is_harmless() -> None:
    """With the smallest positive budget, arrival and deadline are equal in floating point."""
    arrivals = Arrivals()
    arrivals.observe(0.0, 0.0)
    arrivals.observe(1.0, 0.5)
    assert all(budgets.budget_s > 0 for budgets in arrivals.classes)
    assert arrivals.count_due(0.6)[0] >= 0
