import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcae_training.augment import Augmentation, Mixing, move, rectangles, resized_crop
from pcae_training.sample_rng import SampleRng

SIDE = 28
ALL_ON: dict[str, Any] = {"crop": 0.3, "shift": 3, "flip": True, "randaugment": 9.0, "erase": 0.5}


def pictures(batch: int) -> Tensor:
    return torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def draws(batch: int, start: int = 0, stop: int | None = None) -> SampleRng:
    return SampleRng(seed=1, step=2, batch_size=batch, start=start, stop=stop)


def coordinates(batch: int, side: int = 64) -> Tensor:
    """Images whose red is where a pixel stands across, and whose green down, in shares."""
    place = (torch.arange(side) + 0.5) / side
    x, y = place.expand(side, side), place[:, None].expand(side, side)
    return torch.stack([x, y, torch.zeros(side, side)]).repeat(batch, 1, 1, 1)


def test_nothing_is_done_by_default() -> None:
    images = torch.rand(3, 3, SIDE, SIDE)
    augment = Augmentation(SIDE)
    assert torch.equal(augment(images, draws(3)), images)
    assert torch.equal(augment.erase_rectangles(images, draws(3)), images)


@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name, value in ALL_ON.items()),
        ALL_ON,
    ],
    ids=str,
)
def test_two_halves_are_the_whole(options: dict[str, Any]) -> None:
    images, augment = pictures(16), Augmentation(SIDE, **options)

    def done(start: int, stop: int) -> Tensor:
        part = draws(16, start, stop)
        return augment.erase_rectangles(augment(images[start:stop], part), part)

    before = images.clone()
    whole = done(0, 16)
    assert torch.equal(images, before)
    assert torch.equal(done(0, 16), whole)
    assert torch.equal(torch.cat([done(0, 8), done(8, 16)]), whole)
    assert torch.equal(done(5, 6), whole[5:6])
    changed = (whole != images).flatten(1).any(dim=1)
    assert 3 < changed.sum() <= 16


def test_another_step_is_another_augmentation() -> None:
    images, augment = pictures(8), Augmentation(SIDE, **ALL_ON)
    assert not torch.equal(augment(images, SampleRng(1, 2, 8)), augment(images, SampleRng(1, 3, 8)))


@pytest.mark.parametrize("side", [28, 33, 224])
def test_sizes_and_range(side: int) -> None:
    images = torch.rand(2, 3, side, side).round()  # black and white: all that can overshoot
    augmented = Augmentation(28, **ALL_ON)(images, draws(2))
    assert augmented.shape == (2, 3, 28, 28)
    assert augmented.dtype == torch.float32
    assert 0 <= augmented.min() < augmented.max() <= 1


def test_autocast_changes_nothing() -> None:
    images, augment = pictures(200), Augmentation(SIDE, crop=0.3, randaugment=9)
    expected = augment(images, draws(200))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, draws(200)), expected)


def test_randaugment_does_half_of_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("pcae_training.augment.operate_", lambda *call: calls.append(call[1:]))
    Augmentation(2, randaugment=8)(torch.zeros(20_000, 3, 2, 2), draws(20_000))
    assert len(calls) == 2
    assert not torch.equal(calls[0][0], calls[1][0])
    for choice, strength, sign in calls:
        counts = choice.bincount()[:15] / 20_000
        assert counts.tolist() == pytest.approx([1 / 30] * 15, abs=0.006)
        assert strength.mean() == pytest.approx(0.8, abs=0.002)
        assert strength.std() == pytest.approx(0.05, abs=0.002)
        assert set(sign.tolist()) == {-1, 1}
        assert abs(sign.mean()) < 0.03


def test_randaugment_at_its_greatest_magnitude_stays_within(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strengths = []
    monkeypatch.setattr("pcae_training.augment.operate_", lambda *call: strengths.append(call[2]))
    Augmentation(2, randaugment=10)(torch.zeros(1000, 3, 2, 2), draws(1000))
    assert torch.cat(strengths).max() == 1


def test_flip_mirrors_half() -> None:
    images = torch.rand(2000, 3, 4, 4)
    flipped = Augmentation(4, flip=True)(images, draws(2000))
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.04)


def test_move_reflects_at_the_edges() -> None:
    images = torch.rand(3, 3, 6, 6)
    moved = move(images, torch.tensor([[0, 0], [2, 0], [-5, 3]]))
    for image, done, (left, up) in zip(images, moved, [(0, 0), (2, 0), (-5, 3)], strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect")
        assert np.array_equal(done, padded[:, 5 + up : 11 + up, 5 + left : 11 + left])


def test_shifts_are_all_as_likely() -> None:
    marked = torch.zeros(9000, 3, 9, 9)
    marked[:, :, 4, 4] = 1
    found = Augmentation(9, shift=1)(marked, draws(9000))[:, 0].mean(dim=0)
    assert found[3:6, 3:6].flatten().tolist() == pytest.approx([1 / 9] * 9, abs=0.015)


def test_without_a_crop_the_middle_is_taken() -> None:
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(Augmentation(5)(images, draws(2)), images[:, :, 2:7, 2:7])
    with pytest.raises(ValueError, match="cannot crop 10 pixels out of images of 9"):
        Augmentation(10)(images, draws(2))


def test_crop_of_a_known_box() -> None:
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.25], [0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.6, 0.7]])
    flipped = torch.tensor([False, False, True])
    crops = resized_crop(coordinates(3), boxes, flipped, 32)
    place = (torch.arange(32) + 0.5) / 32
    for crop, (left, top, width, height), flip in zip(crops, boxes, flipped, strict=True):
        across = left + width * (1 - place if flip else place)
        down = top + height * place
        inner = slice(2, -2)  # at the edges of an image a gradient ends
        wanted = torch.stack([across.expand(32, 32), down[:, None].expand(32, 32)])
        apart = (crop[:2] - wanted)[:, inner, inner].abs()
        assert apart.max() < 0.1 / 64  # of a pixel


def test_crop_of_everything_is_the_image() -> None:
    images = pictures(2)
    whole = torch.tensor([[0.0, 0, 1, 1]]).expand(2, 4)
    same = resized_crop(images, whole, torch.zeros(2, dtype=torch.bool), SIDE)
    torch.testing.assert_close(same, images, atol=1e-4, rtol=0)


def test_crops_are_not_dark_at_the_edges() -> None:
    white = Augmentation(24, crop=0.5)(torch.ones(20, 3, 12, 12), draws(20))
    torch.testing.assert_close(white, torch.ones(20, 3, 24, 24))


def test_crops_take_as_much_as_they_say() -> None:
    crops = Augmentation(8, crop=0.2, flip=True)(coordinates(3000, 32), draws(3000))
    across = (crops[:, 0, 4, 5] - crops[:, 0, 4, 2]) * 8 / 3  # widths; below 0: mirrored
    width, height = across.abs(), (crops[:, 1, 5, 4] - crops[:, 1, 2, 4]) * 8 / 3
    area, aspect = width * height, width / height
    assert (across < 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert 0.18 < area.min() < 0.22
    assert area.median() == pytest.approx(0.6, abs=0.03)
    assert 0.72 < aspect.min() < 0.78
    assert 1.29 < aspect.max() < 1.37
    assert aspect.log().mean() == pytest.approx(0, abs=0.02)
    middle = (crops[:, :2, 3:5, 3:5]).mean(dim=(2, 3))
    assert middle.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)


def test_rectangles_fit() -> None:
    numbers = torch.rand(5000, 4, generator=torch.Generator().manual_seed(0))
    left, top, width, height = rectangles(numbers, (0.02, 0.9), (0.3, 1 / 0.3)).unbind(1)
    assert left.min() >= 0
    assert top.min() >= 0
    assert (left + width).max() <= 1 + 1e-6
    assert (top + height).max() <= 1 + 1e-6
    small = width.maximum(height) < 1  # nothing was cut
    expected = 0.02 + 0.88 * numbers[:, 0]
    torch.testing.assert_close((width * height)[small], expected[small])
    assert small.float().mean() > 0.5


def test_erased_rectangles_hold_noise() -> None:
    images = torch.full((2000, 3, 32, 32), 7.0)
    erased = Augmentation(32, erase=0.25).erase_rectangles(images, draws(2000))
    assert torch.equal(images, torch.full_like(images, 7))
    gone = (erased != 7).any(dim=1)  # [B, S, S]
    hit = gone.flatten(1).any(dim=1)
    assert hit.float().mean() == pytest.approx(0.25, abs=0.03)
    rows, columns = gone[hit].any(dim=2).sum(dim=1), gone[hit].any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, gone[hit].sum(dim=(1, 2)))  # one rectangle each
    area = (rows * columns) / 32**2
    assert area.min() > 0.01
    assert area.max() < 0.36
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    noise = erased[hit].movedim(1, -1)[gone[hit]]
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)
    at_one_pixel = erased[:, 0, 16, 16][gone[:, 16, 16]]
    assert len(set(at_one_pixel.tolist())) > 0.8 * len(at_one_pixel)  # windows differ


def test_targets_without_mixing() -> None:
    images = torch.rand(3, 3, 4, 4)
    mixed, targets = Mixing(smoothing=0.1)(images, torch.tensor([0, 3, 1]), 4, draws(3))
    assert torch.equal(mixed, images)
    torch.testing.assert_close(targets[1], torch.tensor([0.025, 0.025, 0.025, 0.925]))


def levels(batch: int, side: int) -> Tensor:
    """Image i is i everywhere."""
    return torch.arange(batch).float()[:, None, None, None].expand(batch, 3, side, side)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_the_shares_of_the_pixels(
    mixup: float, cutmix: float, smoothing: float
) -> None:
    mixing = Mixing(mixup, cutmix, smoothing)
    images, labels = levels(21, 16), torch.arange(21)
    mixed, targets = mixing(images, labels, 21, draws(21))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(21))
    assert torch.equal(mixed[20], images[20])  # has no neighbour
    for i in range(20):
        partner = i ^ 1
        taken = ((mixed[i] - i) / (partner - i)).mean().item()
        expected = (1 - smoothing) * torch.tensor([1 - taken, taken]) + smoothing / 21
        torch.testing.assert_close(targets[i, [i, partner]], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[::2][:10] + mixed[1::2], images[::2][:10] + images[1::2])


def test_cutmix_moves_one_rectangle() -> None:
    mixed, _ = Mixing(cutmix=1.0)(levels(40, 16), torch.zeros(40).long(), 2, draws(40))
    moved = (mixed != levels(40, 16)).any(dim=1)  # [B, S, S]
    assert set(mixed.flatten().tolist()) <= set(range(40))  # whole pixels
    rows, columns = moved.any(dim=2).sum(dim=1), moved.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, moved.sum(dim=(1, 2)))
    assert torch.equal(moved[::2], moved[1::2])
    assert len(set(map(tuple, moved.flatten(1).tolist()))) > 10


def test_cutmix_takes_as_much_as_it_says() -> None:
    labels = torch.tensor([0, 1]).repeat(3000)
    _, targets = Mixing(cutmix=1.0)(torch.zeros(6000, 1, 64, 64), labels, 2, draws(6000))
    # Of a box of side s around any point, s - s^2 / 4 is inside each way; s^2 is uniform.
    expected = 2 * (1 / 4 - 1 / 10 + 1 / 96)  # the integral of 2s (s - s^2 / 4)^2
    assert targets[::2, 1].mean() == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    labels = torch.tensor([0, 1]).repeat(4000)
    _, targets = Mixing(mixup=alpha)(torch.zeros(8000, 3, 1, 1), labels, 2, draws(8000))
    share = targets[::2, 0]
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert share.std() == pytest.approx(math.sqrt(1 / (4 * (2 * alpha + 1))), abs=0.01)


def test_half_of_the_pairs_are_cut() -> None:
    images = torch.tensor([0.0, 1.0]).repeat(1000)[:, None, None, None].expand(2000, 3, 6, 6)
    mixed, _ = Mixing(0.8, 1.0)(images, torch.zeros(2000).long(), 2, draws(2000))
    whole = ((mixed == 0) | (mixed == 1)).flatten(1).all(dim=1)
    assert whole[::2].float().mean() == pytest.approx(0.5, abs=0.06)


def test_mixing_two_halves_is_mixing_the_whole() -> None:
    mixing, images, labels = Mixing(0.8, 1.0, 0.1), pictures(12), torch.arange(12) % 5
    whole = mixing(images, labels, 5, draws(12))
    assert not torch.equal(whole[0], images)
    halves = [
        mixing(images[part], labels[part], 5, draws(12, part.start, part.stop))
        for part in (slice(0, 6), slice(6, 12))
    ]
    for expected, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_one_image_is_left_unmixed() -> None:
    image = pictures(1)
    mixed, targets = Mixing(0.8, 1.0)(image, torch.tensor([2]), 4, draws(1))
    assert torch.equal(mixed, image)
    assert targets.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size 0 is not between 1"),
        ({"crop": 1.2}, "crop 1.2 is not between 0 and 1"),
        ({"shift": 28}, "shift 28 is not between 0 and 27"),
        ({"randaugment": 11}, "randaugment 11 is not between 0 and 10"),
        ({"erase": -0.1}, "erase -0.1 is not between"),
        ({"crop": math.nan}, "crop nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**{"size": 28, **options})


@pytest.mark.parametrize("options", [{"mixup": -1}, {"cutmix": -1}, {"smoothing": 1.5}])
def test_mixing_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is not between 0 and"):
        Mixing(**options)
