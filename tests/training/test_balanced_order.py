"""Each class equally often in an epoch."""

import torch

from pcae_training.balanced_order import balanced_order


def order(labels: list[int], seed: int = 0) -> list[int]:
    draws = torch.Generator().manual_seed(seed)
    rows: list[int] = balanced_order(torch.tensor(labels), draws).tolist()
    return rows


def test_each_class_occurs_equally_often_and_each_image_nearly() -> None:
    labels = [0] * 20 + [3] * 3 + [5] * 8
    rows = order(labels)
    assert len(rows) == len(labels)
    counts = {label: sum(labels[row] == label for row in rows) for label in (0, 3, 5)}
    assert sorted(counts.values()) == [10, 10, 11]
    assert len(set(rows) & set(range(20))) == counts[0]  # none of a large class twice
    small = [sum(row == image for row in rows) for image in range(20, 23)]
    assert max(small) - min(small) <= 1


def test_the_order_depends_on_the_draws_alone() -> None:
    labels = [0, 1, 1, 1, 2, 2]
    assert order(labels) == order(labels)
    assert order(labels) != order(labels, seed=1)
    assert sorted({row for seed in range(20) for row in order(labels, seed)}) == list(range(6))


def test_one_class_alone_is_a_permutation() -> None:
    assert sorted(order([4] * 7)) == list(range(7))
