import pytest
import torch

from pcae_training.holdout import default_holdout, hold_out
from pcae_training.source import DataError

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


def test_hold_out_is_disjoint_whole_and_reproducible() -> None:
    split = hold_out(LABELS, 15, "x", seed=3)
    assert len(split.holdout) == 15
    assert sorted(split.train + split.holdout) == list(range(100))
    assert hold_out(LABELS, 15, "x", seed=3) == split
    assert hold_out(LABELS, 15, "x", seed=4) != split


@pytest.mark.parametrize("count", [1, 2, 3, 10, 15, 33, 50, 96, 97])
def test_classes_are_held_out_by_their_share(count: int) -> None:
    held = torch.bincount(LABELS[hold_out(LABELS, count, "x").holdout], minlength=3)
    assert int(held.sum()) == count
    exact = torch.tensor([60, 30, 10]) * count / 100
    room = torch.tensor([59, 29, 9])
    assert ((held - torch.minimum(exact, room)).abs() < 1.5).all()
    assert (held <= room).all()


def test_a_single_image_stays_in_training() -> None:
    labels = torch.tensor([4, 4, 4, 5, 6, 6])
    split = hold_out(labels, 3, "x")
    assert sorted(set(labels[split.train].tolist())) == [4, 5, 6]


@pytest.mark.parametrize("count", [0, 98, 100, 101])
def test_hold_out_leaves_something(count: int) -> None:
    with pytest.raises(DataError, match=rf"cannot hold out {count} of the 100 .* at most 97"):
        hold_out(LABELS, count, "x")


def test_nothing_to_hold_out() -> None:
    with pytest.raises(DataError, match="each of its classes has one only; give --eval-data"):
        hold_out(torch.tensor([0, 1, 2]), 1, "x")


@pytest.mark.parametrize(
    ("labels", "count"),
    [(LABELS, 20), (torch.arange(8).repeat(12), 19), (torch.arange(40).repeat(2), 40),
     (torch.zeros(60_000, dtype=torch.int64), 5000), (torch.tensor([0, 1, 1]), 1)],
)  # fmt: skip
def test_the_default_shrinks_with_the_data(labels: torch.Tensor, count: int) -> None:
    assert default_holdout(labels, 5000) == count
    assert len(hold_out(labels, count, "x").holdout) == count
