"""The tier for the time that is left, on a virtual clock."""

from collections import Counter
from collections.abc import Callable

import pytest

from pcae_serve.local.time_plan import TimePlan, parse_duration

ACCURACY = (0.8, 0.85, 0.9)
IMAGE_S = {0: 0.01, 1: 0.02, 2: 0.04}


def run(
    images: int, total_s: float, real_s: Callable[[int, float], float], batch: int = 10
) -> tuple[Counter[int], float]:
    """Return how many images ran on each tier, and how long all took. real_s: tier, now -> s."""
    plan = TimePlan((0, 1, 2), ACCURACY, IMAGE_S, total_s)
    now_s, tiers = 0.0, Counter[int]()
    while images:
        tier = plan.choose(now_s, images)
        size = min(batch, images)
        now_s += size * real_s(tier, now_s)
        tiers[tier] += size
        images -= size
    return tiers, now_s


def as_predicted(tier: int, now_s: float) -> float:
    return IMAGE_S[tier]


def test_ample_time_is_for_the_most_accurate_tier() -> None:
    assert run(1000, 100, as_predicted)[0] == Counter({2: 1000})


@pytest.mark.parametrize("total_s", [12, 15, 20, 25, 30, 39])
def test_scarce_time_is_used_and_not_exceeded(total_s: float) -> None:
    tiers, took_s = run(1000, total_s, as_predicted)
    assert 0.9 * total_s <= took_s <= total_s
    assert len(tiers) > 1


def test_too_little_time_is_for_the_cheapest() -> None:
    assert run(1000, 5, as_predicted)[0] == Counter({0: 1000})
    plan = TimePlan((0, 1, 2), ACCURACY, IMAGE_S, 5)
    assert plan.late_s(0, 1000) == pytest.approx(5)
    assert plan.late_s(0, 400) == 0


@pytest.mark.parametrize("more_s", [0.005, 0.03])
def test_decoding_is_learnt(more_s: float) -> None:
    """It adds the same to each tier."""
    _, took_s = run(1000, 45, lambda tier, now_s: IMAGE_S[tier] + more_s)
    assert took_s <= 45


def test_a_machine_that_slows_down_is_followed() -> None:
    tiers, took_s = run(1000, 41, lambda tier, now_s: IMAGE_S[tier] * (1 if now_s < 20 else 2))
    assert took_s <= 41
    assert tiers[2] >= 400


def test_a_machine_that_is_faster_than_predicted_returns_to_better_tiers() -> None:
    tiers, took_s = run(1000, 25, lambda tier, now_s: IMAGE_S[tier] / 2)
    assert took_s <= 25
    assert tiers[2] > 300


def test_the_cheapest_of_equally_accurate_tiers_is_used() -> None:
    plan = TimePlan((0, 1, 2), (0.8, 0.9, 0.9), IMAGE_S, 1000)
    assert plan.choose(0, 10) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("10min", 600), ("1h30m", 5400), ("0.5H", 1800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "-5", "10 m 3", "1h30", "inf", "5d"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize("parallel", [2, 8])
def test_batches_that_run_together_count_together(parallel: int) -> None:
    """Each takes `parallel` times as long as the plan's seconds per image; none is mistaken."""
    for total_s, expected in ((43, {2}), (22, {1})):
        plan = TimePlan((0, 1, 2), ACCURACY, IMAGE_S, total_s, parallel)
        now_s, left, batch, tiers = 0.0, 1000, 10, Counter[int]()
        running: list[float] = []  # when each ends
        while left > 0:
            tier = plan.choose(now_s, left)
            tiers[tier] += 1
            running.append(now_s + parallel * batch * IMAGE_S[tier])
            if len(running) == parallel + 1:  # one waits for the first that ends
                running.sort()
                now_s = running.pop(0)
                running[-1] = now_s + parallel * batch * IMAGE_S[tier]
                left -= batch
        assert max(tiers, key=tiers.__getitem__) in expected
        assert sum(tiers[tier] for tier in expected) > 0.9 * sum(tiers.values())
