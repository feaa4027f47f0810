from collections.abc import Hashable

import pytest

from pcae_training.skipped import FLOOR, Skipped
from pcae_training.source import DataError


def reasons(count: int, start: int = 0) -> dict[Hashable, str]:
    return {i: f"x, row {i}: cut" for i in range(start, start + count)}


def test_each_image_counts_once() -> None:
    skipped = Skipped("x", 0.01, images=50)
    for _ in range(100):  # epochs
        skipped.add(reasons(1), 50)
    assert len(skipped) == 1
    skipped.add(reasons(2, start=7), 50)
    assert len(skipped) == 3


def test_a_few_end_no_run() -> None:
    Skipped("x", 0.0).add(reasons(FLOOR), FLOOR)


def test_a_small_share_ends_no_run() -> None:
    skipped = Skipped("x", 0.01)
    skipped.add(reasons(20), 2000)
    with pytest.raises(DataError) as raised:
        skipped.add(reasons(1, start=20), 0)
    assert str(raised.value) == (
        "x: 21 of 2,000 images cannot be read (1.1%; --max-unreadable allows 1.0%);"
        " the first one: x, row 0: cut"
    )


def test_the_share_is_of_different_images() -> None:
    skipped = Skipped("x", 0.01, images=1000)
    with pytest.raises(DataError, match="11 of 1,000 images"):
        skipped.add(reasons(11), 50_000)
