import pytest
import torch
from torch import nn

from pcae_training.masking import gather, hide_patches, patchify, visible_patches


@pytest.mark.parametrize(
    ("ratio", "visible"), [(0.75, 49), (0.85, 29), (0.9, 19), (0.6, 78)]
)  # the counts of the paper's text and code; 0.85 and 0.9 are where binary floats go wrong
def test_counts(ratio: float, visible: int) -> None:
    assert visible_patches(196, ratio) == visible


def test_every_patch_once_and_the_noisiest_hidden() -> None:
    noise = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))
    parts = hide_patches(noise, 0.75)
    assert parts.visible.shape == (5, 4)
    for row, visible, hidden in zip(noise, *parts, strict=True):
        assert sorted([*visible.tolist(), *hidden.tolist()]) == list(range(16))
        assert row[visible].max() < row[hidden].min()


def test_squares_are_hidden_as_a_whole() -> None:
    noise = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))  # of a 6 x 6 grid
    parts = hide_patches(noise, 0.6, unit=2)
    assert parts.hidden.shape == (3, 6 * 4)
    for row, hidden in zip(noise, parts.hidden, strict=True):
        shown = torch.ones(6, 6)
        shown.view(-1)[hidden] = 0
        squares = shown.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).flatten(0, 1)  # [9, 4]
        assert all(len(set(square.tolist())) == 1 for square in squares)
        whole = squares[:, 0] == 1
        assert set(whole.nonzero().flatten().tolist()) == set(row.argsort()[:3].tolist())


def test_patches_are_read_as_a_convolution_reads_them() -> None:
    torch.manual_seed(0)
    images, projection = torch.randn(2, 3, 8, 12), nn.Conv2d(3, 5, kernel_size=4, stride=4)
    values = patchify(images, 4)
    assert values.shape == (2, 6, 48)
    weight, bias = projection.parameters()
    tokens = values @ weight.flatten(1).T + bias
    torch.testing.assert_close(tokens, projection(images).flatten(2).transpose(1, 2))


def test_gather_takes_rows() -> None:
    tokens = torch.arange(24.0).view(2, 4, 3)
    rows = gather(tokens, torch.tensor([[3, 0], [1, 1]]))
    assert rows[0].tolist() == [[9, 10, 11], [0, 1, 2]]
    assert rows[1].tolist() == [[15, 16, 17], [15, 16, 17]]
