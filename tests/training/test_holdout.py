import pytest
import torch

from pcae_training.holdout import default_holdout, hold_out, hold_out_fold
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


GROUPS = [f"{label}/{row // 5}" for row, label in enumerate(LABELS.tolist())]


@pytest.mark.parametrize("count", [10, 20, 33])
def test_groups_stay_together_and_classes_keep_their_share(count: int) -> None:
    split = hold_out(LABELS, count, "x", groups=GROUPS)
    train, held = ({GROUPS[row] for row in rows} for rows in (split.train, split.holdout))
    assert not train & held
    assert sorted(split.train + split.holdout) == list(range(100))
    shares = torch.bincount(LABELS[split.holdout], minlength=3) - torch.tensor([60, 30, 10]) * (
        count / 100
    )
    assert (shares.abs() <= 2.5).all()  # half of a group


def test_one_group_of_each_class_stays_in_training() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    groups = ["a"] * 9 + ["b"] + ["c"] * 10
    split = hold_out(labels, 5, "x", groups=groups)
    assert set(labels[split.train].tolist()) == {0, 1}
    assert split.unmeasured == [1]
    with pytest.raises(DataError, match=r"one group of each class stays .* can be at most 9"):
        hold_out(labels, 10, "x", groups=groups)


def test_a_group_in_two_classes() -> None:
    with pytest.raises(DataError, match="the group 'a' has images of 2 classes") as caught:
        hold_out(torch.tensor([0, 0, 1, 1]), 1, "x", groups=["b", "a", "a", "c"])
    assert "--eval-data" in str(caught.value)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_each_row_is_in_one_fold(groups: list[str] | None) -> None:
    folds = [hold_out_fold(LABELS, i, 4, "x", 3, groups) for i in range(1, 5)]
    assert sorted(row for fold in folds for row in fold.holdout) == list(range(100))
    step = 5 if groups else 1
    for fold in folds:
        assert sorted(fold.train + fold.holdout) == list(range(100))
        counts = torch.bincount(LABELS[fold.holdout], minlength=3)
        assert ((counts - torch.tensor([15, 7.5, 2.5])).abs() <= step).all()
    assert max(len(f.holdout) for f in folds) - min(len(f.holdout) for f in folds) <= step
    assert hold_out_fold(LABELS, 1, 4, "x", 4, groups) != folds[0]


def test_a_fold_without_images() -> None:
    with pytest.raises(DataError, match="fold 3 of 3 has no images; use fewer folds"):
        hold_out_fold(torch.tensor([0, 0]), 3, 3, "x")
