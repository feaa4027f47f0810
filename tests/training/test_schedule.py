import math

import pytest

from pcae_training.schedule import cosine, ladder, ramped

PROGRESS = [i / 1000 for i in range(1001)]


LADDERS = [(1.0,), (1.0, 0.9, 0.8, 0.7, 0.6), (1.0, 0.5, 0.3), (1.0, 0.99)]


@pytest.mark.parametrize("rungs", LADDERS)
@pytest.mark.parametrize(("start", "length"), [(0.1, 0.25), (0, 0.1), (0, 0), (0.5, 0), (0, 1)])
def test_ramp_goes_down_the_ladder(rungs: tuple[float, ...], start: float, length: float) -> None:
    ratios = [ramped(rungs, progress, start, length) for progress in PROGRESS]
    assert set(ratios) <= set(rungs)  # few shapes
    assert ratios == sorted(ratios, reverse=True)
    assert all(ratio == 1 for ratio, at in zip(ratios, PROGRESS, strict=True) if at < start)
    after = [ratio for ratio, at in zip(ratios, PROGRESS, strict=True) if at >= start + length]
    assert after
    assert set(after) == {rungs[-1]}


def test_ramp_is_never_ahead_of_the_line() -> None:
    rungs = (1.0, 0.9, 0.8, 0.7, 0.6)
    assert ramped(rungs, 0.1) == 1.0
    assert ramped(rungs, 0.16) == 1.0  # the line: 0.904
    assert ramped(rungs, 0.163) == 0.9
    assert ramped(rungs, 0.225) == 0.8
    assert ramped(rungs, 0.349) == 0.7
    assert ramped(rungs, 0.35) == 0.6
    for progress in PROGRESS[100:351]:
        assert ramped(rungs, progress) >= 1 - 0.4 * (progress - 0.1) / 0.25 - 1e-9


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
def test_ladder_is_short_and_ends_where_it_should(
    keep_ratio: float, expected: tuple[float, ...]
) -> None:
    assert ladder(keep_ratio) == expected


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
