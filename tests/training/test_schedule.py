import math

import pytest

from pcae_training.schedule import cosine, keep_ratio_ramp, lowest_keep_ratio

PROGRESS = [i / 1000 for i in range(1001)]


RAMPS = [(1.0,), (1.0, 0.9, 0.8, 0.7, 0.6), (1.0, 0.5, 0.3), (1.0, 0.99)]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(("start", "length"), [(0.1, 0.25), (0, 0.1), (0, 0), (0.5, 0), (0, 1)])
def test_the_lowest_keep_ratio_falls_along_the_ramp(
    ramp: tuple[float, ...], start: float, length: float
) -> None:
    ratios = [lowest_keep_ratio(ramp, progress, start, length) for progress in PROGRESS]
    assert set(ratios) <= set(ramp)  # few shapes
    assert ratios == sorted(ratios, reverse=True)
    assert all(ratio == 1 for ratio, at in zip(ratios, PROGRESS, strict=True) if at < start)
    after = [ratio for ratio, at in zip(ratios, PROGRESS, strict=True) if at >= start + length]
    assert after
    assert set(after) == {ramp[-1]}


def test_ramp_is_never_ahead_of_the_line() -> None:
    ramp = (1.0, 0.9, 0.8, 0.7, 0.6)
    assert lowest_keep_ratio(ramp, 0.1) == 1.0
    assert lowest_keep_ratio(ramp, 0.16) == 1.0  # the line: 0.904
    assert lowest_keep_ratio(ramp, 0.163) == 0.9
    assert lowest_keep_ratio(ramp, 0.225) == 0.8
    assert lowest_keep_ratio(ramp, 0.349) == 0.7
    assert lowest_keep_ratio(ramp, 0.35) == 0.6
    for progress in PROGRESS[100:351]:
        assert lowest_keep_ratio(ramp, progress) >= 1 - 0.4 * (progress - 0.1) / 0.25 - 1e-9


@pytest.mark.parametrize(
    ("keep_ratio", "expected"),
    [
        (0.6, (1.0, 0.9, 0.8, 0.7, 0.6)),
        (0.7, (1.0, 0.93, 0.85, 0.78, 0.7)),
        (1.0, (1.0,)),
        (0.99, (1.0, 0.99)),
        (0.333, (1.0, 0.83, 0.67, 0.5, 0.333)),
    ],
)
def test_the_ramp_is_short_and_ends_at_the_keep_ratio(
    keep_ratio: float, expected: tuple[float, ...]
) -> None:
    assert keep_ratio_ramp(keep_ratio) == expected


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
