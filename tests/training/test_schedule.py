import math

import pytest

from pcae_training.schedule import cosine, ramped

PROGRESS = [i / 1000 for i in range(1001)]


@pytest.mark.parametrize("keep_ratio", [1.0, 0.9, 0.6, 0.33333, 0.3])
@pytest.mark.parametrize(("start", "length"), [(0.1, 0.25), (0, 0.1), (0, 0), (0.5, 0), (0, 1)])
def test_ramp_falls_from_one_to_the_keep_ratio(
    keep_ratio: float, start: float, length: float
) -> None:
    ratios = [ramped(keep_ratio, progress, start, length) for progress in PROGRESS]
    assert ratios == sorted(ratios, reverse=True)
    assert all(ratio == 1 for ratio, at in zip(ratios, PROGRESS, strict=True) if at < start)
    after = [ratio for ratio, at in zip(ratios, PROGRESS, strict=True) if at >= start + length]
    assert after
    assert set(after) == {keep_ratio}


def test_ramp_is_a_line() -> None:
    assert ramped(0.6, 0.1) == 1.0
    assert ramped(0.6, 0.225) == 0.8
    assert ramped(0.6, 0.35) == 0.6


def test_cosine_rises_then_falls() -> None:
    factors = [cosine(progress, warmup=0.2, final=0.1) for progress in PROGRESS]
    assert factors[0] == 0
    assert factors[:201] == sorted(factors[:201])
    assert factors[200:] == sorted(factors[200:], reverse=True)
    assert factors[200] == 1
    assert factors[-1] == pytest.approx(0.1)
    assert cosine(0.6) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.55 / 0.95)))


def test_cosine_without_warmup_starts_at_the_peak() -> None:
    assert cosine(0.0, warmup=0) == 1
    assert cosine(1.5, warmup=0) == pytest.approx(0)
