"""Which differences in accuracy count."""

import pytest

from pcae_serve.scheduling.tiers import TierTable

NAMES = ("a", "b", "c", "d")


def table(*accuracy: float, margin: float = 0.0) -> TierTable:
    n = len(accuracy)
    return TierTable(NAMES[:n], accuracy, ((margin,) * n,) * n if margin else ())


@pytest.mark.parametrize(
    ("accuracy", "margin", "counted"),
    [
        ((0.80, 0.85, 0.90), 0.0, (0.80, 0.85, 0.90)),
        ((0.80, 0.85, 0.90), 0.04, (0.80, 0.85, 0.90)),
        ((0.80, 0.85, 0.90), 0.06, (0.80, 0.85, 0.85)),  # the middle one stands for the best
        ((0.80, 0.85, 0.90), 0.11, (0.80, 0.80, 0.80)),
        ((0.80, 0.80, 0.90), 0.0, (0.80, 0.80, 0.90)),
        ((0.80, 0.79, 0.90), 0.0, (0.80, 0.79, 0.90)),  # never more than it was measured
        ((0.80, 0.79, 0.78), 0.0, (0.80, 0.79, 0.78)),
        ((0.8773, 0.8804, 0.8836, 0.887), 0.009, (0.8773, 0.8804, 0.8804, 0.8804)),  # the demo
    ],
)
def test_a_difference_inside_its_interval_is_none(
    accuracy: tuple[float, ...], margin: float, counted: tuple[float, ...]
) -> None:
    tiers = tuple(range(len(accuracy)))
    found = table(*accuracy, margin=margin).counted(tiers)
    assert tuple(found[tier] for tier in tiers) == counted


def test_only_allowed_tiers_stand_for_others() -> None:
    demo = table(0.8773, 0.8804, 0.8836, 0.887, margin=0.009)
    assert demo.counted((3,)) == {3: 0.887}
    assert demo.counted((2, 3)) == {2: 0.8836, 3: 0.8836}
    assert demo.counted((0, 1)) == {0: 0.8773, 1: 0.8773}
