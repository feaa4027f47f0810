"""The exact search against enumeration on small instances, and against schedules by hand."""

from itertools import combinations

import numpy as np
import pytest

from benchmarks import optimal_schedule
from benchmarks.optimal_schedule import LagrangianBound, Schedule, best
from pcae_serve.loadtest.clairvoyant import ROUNDING_S, TOLERANCE, Floats, Labels, make_problem

GPU_S = (1.8 + 0.45 * np.array([[0.29], [0.5], [1.0]]) * np.arange(1, 33)) * 1e-3  # [3, 32]
CPU_S = 20e-3 * np.array([[0.29], [0.5], [1.0]]) * np.arange(1, 9)  # [3, 8]
ACCURACY = [0.745, 0.805, 0.848]


def every(times_s: Floats, deadlines_s: Floats, accuracy: Floats, seconds: Floats) -> float:
    """Return the most value over all batches of all members, in all orders."""

    def go(free_s: float, left: tuple[int, ...]) -> float:
        most = 0.0
        for size in range(1, min(seconds.shape[1], len(left)) + 1):
            for members in combinations(left, size):
                start_s = max(free_s, *(times_s[i] for i in members))
                rest = tuple(i for i in left if i not in members)
                for tier, worth in enumerate(accuracy):
                    end_s = start_s + seconds[tier, size - 1]
                    if all(end_s <= deadlines_s[i] + ROUNDING_S for i in members):
                        most = max(most, size * worth + go(end_s, rest))
        return most

    return go(0.0, tuple(range(len(times_s))))


def small(seed: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Return up to five requests on up to three tiers; every third seed has ties in time."""
    rng = np.random.default_rng(seed)
    n, tiers, most = rng.integers(1, 6), rng.integers(1, 4), rng.integers(1, 5)
    ratio = np.sort(rng.uniform(0.2, 1, tiers))[:, None]
    seconds = rng.uniform(0, 1.5) + ratio * np.arange(1, most + 1) ** rng.uniform(0.6, 1.05)
    times_s = rng.exponential(rng.uniform(0.1, 1.5), n).cumsum()
    if seed % 3 == 0:
        seconds, times_s = np.ceil(seconds * 2) / 2, np.round(times_s * 2) / 2
    budgets_s = seconds[-1, 0] * rng.choice([1.0, 1.5, 2.0, 3.0, 6.0], n)
    return times_s, budgets_s, np.sort(rng.uniform(0.3, 1, tiers)), seconds


def window(seed: int, n: int, rate: float, full_s: float) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    return rng.exponential(1 / rate, n).cumsum(), full_s * rng.choice([3.0, 8.0, 50.0], n)


def check(
    found: Schedule, times_s: Floats, budgets_s: Floats, accuracy: Floats, seconds: Floats
) -> None:
    """Assert that a schedule is feasible and has the value that it states."""
    members = [i for batch in found.batches for i in batch.members]
    assert len(members) == len(set(members)) == found.served
    value, free_s = 0.0, -np.inf
    for batch in found.batches:
        assert batch.start_s >= free_s - 1e-9
        free_s = batch.end_s
        took_s = seconds[batch.tier][len(batch.members) - 1]
        assert batch.end_s - batch.start_s == pytest.approx(took_s)
        for i in batch.members:
            assert times_s[i] <= batch.start_s + 1e-9
            assert batch.end_s <= times_s[i] + budgets_s[i] + 1e-9
        value += len(batch.members) * accuracy[batch.tier]
    assert value == pytest.approx(found.value)
    assert found.upper >= found.value


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_value_equals_that_of_full_enumeration(start: int) -> None:
    for seed in range(start, start + 50):
        times_s, budgets_s, accuracy, seconds = small(seed)
        found = best(times_s, budgets_s, accuracy, seconds)
        assert found.optimal
        assert found.value == pytest.approx(every(times_s, times_s + budgets_s, accuracy, seconds))
        check(found, times_s, budgets_s, accuracy, seconds)


@pytest.mark.parametrize("seed", range(60))
def test_count_equals_that_of_full_enumeration(seed: int) -> None:
    times_s, budgets_s, accuracy, seconds = small(seed)
    found = best(times_s, budgets_s, accuracy, seconds, objective="count")
    assert found.value == every(times_s, times_s + budgets_s, np.ones_like(accuracy), seconds)
    assert found.value == found.served


def test_bound_is_no_lower_than_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        optimal_schedule, "FIRST_WIDTH", 1
    )  # so that the bound has something to prune
    for seed in range(1000, 1060):
        times_s, budgets_s, accuracy, seconds = small(seed)
        most = every(times_s, times_s + budgets_s, accuracy, seconds)
        assert best(times_s, budgets_s, accuracy, seconds).value == pytest.approx(most)
        problem = make_problem(times_s, budgets_s, accuracy, seconds)
        bound = LagrangianBound(problem)
        bound.settle(most)
        root = Labels.root(problem, bound)
        assert root.bound[0] >= most - TOLERANCE


def test_waits_for_a_second_arrival_if_that_pays() -> None:
    # alone, each takes 1.0; together, 1.1; the second must be done 1.2 after it comes
    found = best([0.0, 0.1], [2.0, 1.2], [1.0], [[1.0, 1.1]])
    assert found.value == 2
    (batch,) = found.batches
    assert (batch.start_s, sorted(batch.members)) == (0.1, [0, 1])


def test_waits_longer_than_the_fastest_batch_takes() -> None:
    # both on the good tier only if the first waits for the second
    found = best([0.0, 0.5], [3.0, 1.1], [0.5, 1.0], [[0.3, 0.3], [1.0, 1.1]])
    assert found.value == 2
    assert found.batches[0].start_s == 0.5


def test_drops_one_tight_to_save_two() -> None:
    # the slow start of the first would make both of the others late
    found = best([0.0, 0.5, 0.5], [1.0, 1.0, 1.0], [1.0], [[1.0, 1.0]])
    assert found.value == 2
    assert sorted(found.batches[0].members) == [1, 2]


def test_takes_the_better_tier_only_if_there_is_time() -> None:
    seconds = [[0.4], [1.0]]
    found = best([0.0, 0.0], [1.0, 1.4], [0.7, 0.9], seconds)
    assert [(batch.tier, batch.members) for batch in found.batches] == [(0, (0,)), (1, (1,))]
    assert best([0.0, 0.0], [1.0, 2.0], [0.7, 0.9], seconds).value == pytest.approx(1.8)


def test_the_origin_of_times_does_not_matter() -> None:
    times_s, budgets_s = window(0, 12, 4000, GPU_S[-1, 0])
    found = best(times_s, budgets_s, ACCURACY, GPU_S)
    later = best(times_s + 1.7e9, budgets_s, ACCURACY, GPU_S)
    assert later.batches[0].start_s >= 1.7e9
    assert later.value == pytest.approx(found.value, abs=0.2)  # such times are good to 0.2 us


def test_no_request_that_can_be_served() -> None:
    assert best([], [], [1.0], [[1.0]]) == Schedule(0.0, 0.0, True, ())
    assert best([0.0], [0.5], [1.0], [[1.0]]) == Schedule(0.0, 0.0, True, ())


def test_a_worthless_tier_is_no_help() -> None:
    # nor does it make the hopeless first one look servable
    found = best([0.0, 9.0], [0.5, 3.0], [0.0, 0.8], [[0.1], [1.0]])
    assert [batch.members for batch in found.batches] == [(1,)]
    assert best([0.0], [5.0], [0.0], [[1.0]]).value == 0


def test_rejects_times_that_fall_as_batches_grow() -> None:
    with pytest.raises(ValueError, match="must not fall"):
        best([0.0], [1.0], [1.0], [[1.0, 0.9]])


@pytest.mark.parametrize(("seconds", "rate"), [(GPU_S, 6000.0), (CPU_S, 150.0)], ids=["gpu", "cpu"])
def test_proves_a_window(seconds: Floats, rate: float) -> None:
    times_s, budgets_s = window(1, 20, rate, seconds[-1, 0])
    found = best(times_s, budgets_s, ACCURACY, seconds)
    assert found.optimal
    check(found, times_s, budgets_s, np.array(ACCURACY), seconds)
    # a narrow search says how far off it may be, and is right
    narrow = best(times_s, budgets_s, ACCURACY, seconds, width=1)
    assert narrow.value <= found.value + 1e-9 <= narrow.upper + 2e-9


def test_a_narrow_search_reports_that_it_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimal_schedule, "FIRST_WIDTH", 1)
    times_s, budgets_s = window(2, 30, 170, CPU_S[-1, 0])
    narrow = best(times_s, budgets_s, ACCURACY, CPU_S, width=1)
    full = best(times_s, budgets_s, ACCURACY, CPU_S)
    check(narrow, times_s, budgets_s, np.array(ACCURACY), CPU_S)
    assert full.optimal
    assert not narrow.optimal
    assert narrow.value <= full.value <= narrow.upper


def test_more_load_is_worth_no_more() -> None:
    times_s, budgets_s = window(3, 20, 1.0, CPU_S[-1, 0])
    values = [
        best(times_s / rate, budgets_s, ACCURACY, CPU_S).value for rate in (50, 100, 200, 400)
    ]
    assert values == sorted(values, reverse=True)


def test_more_batch_is_worth_no_less() -> None:
    times_s, budgets_s = window(4, 16, 8000, GPU_S[-1, 0])
    values = [
        best(times_s, budgets_s / 3, ACCURACY, GPU_S, max_batch=most).value
        for most in (1, 2, 8, 32)
    ]
    assert values == sorted(values)
