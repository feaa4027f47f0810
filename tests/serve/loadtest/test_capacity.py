"""Capacity in cases with a known answer, and its monotonicity."""

import numpy as np
import pytest

from benchmarks.optimal_schedule import best
from pcae_serve.loadtest.capacity import capacity, draw_trace, fastest_tier, share_answered

GPU_S = (1.8 + 0.45 * np.array([[0.29], [1.0]]) * np.arange(1, 33)) * 1e-3  # [2, 32]
CPU_S = 20e-3 * np.array([[0.29], [1.0]]) * np.arange(1, 9)  # [2, 8]
FULL_S = float(GPU_S[-1, 0])


def test_without_batching_and_urgency_the_device_is_always_busy() -> None:
    # neither batches nor urgency matter: the rate of the device, over the share to be answered
    rate = capacity([100 * 20e-3], [1], CPU_S, requests=400)
    assert rate == pytest.approx(1 / CPU_S[0, 0] / 0.99, rel=0.02)


def test_full_batches_are_an_upper_limit() -> None:
    rate = capacity([3 * FULL_S, 8 * FULL_S], [1, 1], GPU_S, requests=300, width=8, precision=0.05)
    most = float((np.arange(1, 33) / GPU_S[0]).max())
    assert 1 / GPU_S[0, 0] < rate < most


def test_a_budget_that_is_too_small_gives_no_capacity() -> None:
    assert capacity([1e-3, 8 * FULL_S], [1, 1], GPU_S, requests=100) == 0.0


def test_is_deterministic_and_falls_with_the_budgets() -> None:
    loose, again, tight = (
        capacity([k * FULL_S], [1], GPU_S, requests=200, width=4, precision=0.05)
        for k in (8, 8, 1.5)
    )
    assert loose == again > tight > 0


def test_the_share_answered_falls_with_the_rate() -> None:
    trace = draw_trace([3 * FULL_S, 8 * FULL_S, 50 * FULL_S], [1, 1, 1], 200, seed=1)
    shares = [share_answered(trace, rate, GPU_S[0], width=8) for rate in (500, 3000, 9000, 27000)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_is_close_to_the_exact_optimum_and_never_above(seed: int) -> None:
    trace = draw_trace([2 * FULL_S, 5 * FULL_S], [1, 1], 40, seed)
    rate = 6000.0
    times_s = trace.at * 40 / rate
    budgets_s = np.minimum(trace.budget_s, 40 / rate + trace.budget_s.min() - times_s)
    exact = best(times_s, budgets_s, [1.0, 1.0], GPU_S, objective="count")
    assert exact.optimal
    assert exact.value - 1 <= 40 * share_answered(trace, rate, GPU_S[0]) <= exact.value


def test_the_fastest_tier_is_that_of_the_fastest_full_batch() -> None:
    assert fastest_tier([[2.0, 2.0], [1.0, 3.0]]).tolist() == [2.0, 2.0]
    assert fastest_tier([[2.0, 2.0], [1.0, 3.0]], max_batch=1).tolist() == [1.0]
