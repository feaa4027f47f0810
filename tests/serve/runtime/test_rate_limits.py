"""Rate limits of API keys, on a clock of their own."""

import math

import pytest

from pcae_serve.callers import Caller
from pcae_serve.runtime.rate_limits import RateLimits

LIMITED = [Caller("slow", rate=2.0), Caller("free"), Caller("rare", rate=0.1)]


def taken(limits: RateLimits, name: str | None, now_s: float, images: int = 100) -> int:
    return sum(not limits.take(name, now_s) for _ in range(images))


def test_the_images_of_one_second_may_come_at_once() -> None:
    limits = RateLimits(LIMITED)
    assert taken(limits, "slow", 1000.0) == 2
    assert limits.take("slow", 1000.0) == pytest.approx(0.5)
    assert taken(limits, "slow", 1000.4) == 0
    assert limits.wait_s("slow", 1000.4) == pytest.approx(0.1)
    assert taken(limits, "slow", 1000.6) == 1
    assert taken(limits, "slow", 2000.0) == 2


def test_a_rate_below_one_per_second_still_lets_an_image_pass() -> None:
    limits = RateLimits(LIMITED)
    assert [taken(limits, "rare", now_s) for now_s in (0.0, 9.0, 10.5)] == [1, 0, 1]


@pytest.mark.parametrize("name", ["free", "unknown", None])
def test_a_caller_without_a_rate_is_not_limited(name: str | None) -> None:
    assert taken(RateLimits(LIMITED), name, 0.0) == 100


def test_over_time_the_rate_is_exact() -> None:
    limits = RateLimits(LIMITED)
    assert sum(not limits.take("slow", i / 100) for i in range(10_000)) == pytest.approx(201, abs=1)


def test_images_that_belong_together_are_counted_together_or_not_at_all() -> None:
    limits = RateLimits([Caller("five", rate=5.0)])
    assert limits.take("five", 100.0, 4) == 0
    assert limits.take("five", 100.0, 3) == pytest.approx(0.4)
    assert limits.take("five", 100.0, 1) == 0  # the three have taken nothing
    assert limits.take("five", 200.0, 6) == math.inf
    assert limits.take("five", 200.0, 5) == 0
