"""Augmentation of a whole batch on its device: crops, RandAugment, erasing, mixup and CutMix.

Every random number comes from `SampleRng`, on the CPU, so it is known without waiting for the
device which images get which operation, and processes that share a batch do what one would do.
(kornia's own random modules draw from global state, and one operation for a whole batch.) Takes
square RGB images and class numbers.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from pcae_training.operations import OPERATIONS, operate_, sampling_grid
from pcae_training.sample_rng import SampleRng, generator

#: Width over height of a random crop.
CROP_ASPECT = (3 / 4, 4 / 3)

#: Share of the image that an erased rectangle takes, and its width over height.
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)

#: RandAugment as MAE fine-tunes with it: operations an image, how likely each is to be done at
#: all, the noise on its magnitude, and what the magnitude is out of.
ROUNDS = 2
PROBABILITY = 0.5
MAGNITUDE_STD = 0.5
MAGNITUDE_MAX = 10


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; everything off by default."""

    size: int  # side of what comes out, in pixels
    crop: float = 0.0  # smallest share of the area a random resized crop takes; 0 = off
    shift: int = 0  # pixels an image may move each way, reflected at its edges; 0 = off
    flip: bool = False  # mirror half of the images
    randaugment: float = 0.0  # magnitude of RandAugment, to 10 (arXiv 1909.13719); 0 = off
    erase: float = 0.0  # share of images with a rectangle erased (arXiv 1708.04896); 0 = off

    def __post_init__(self) -> None:
        _check("size", self.size, 1, math.inf)
        _check("crop", self.crop, 0, 1)
        _check("shift", self.shift, 0, self.size - 1)
        _check("randaugment", self.randaugment, 0, MAGNITUDE_MAX)
        _check("erase", self.erase, 0, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor, rng: SampleRng) -> Tensor:
        """Float [B, 3, S, S] in [0, 1] to [B, 3, size, size] in [0, 1], on the same device.

        Without a crop the centre is taken, and S must not be below `size` (ValueError). Nothing is
        erased yet: see `erased`.
        """
        # Colours and places need float32, whatever the trainer computes in.
        with torch.autocast(images.device.type, enabled=False):
            flipped = rng.uniform("flip") < (0.5 if self.flip else 0)
            if self.crop:
                boxes = rectangles(rng.uniform("crop", 4), (self.crop, 1), CROP_ASPECT)
                images = resized_crop(images, boxes, flipped, self.size)
            else:
                images = mirror(centre(images, self.size), flipped)
            if self.shift:
                steps = rng.uniform("shift", 2) * (2 * self.shift + 1)
                images = move(images, steps.long() - self.shift)
            if self.randaugment:
                images = self._randaugmented(images, rng)
        return images

    @torch.no_grad()
    def erased(self, normalised: Tensor, rng: SampleRng) -> Tensor:
        """Normalised [B, 3, size, size] with noise of N(0, 1) in a rectangle of some images.

        The noise is a window of a fixed tile, at an offset drawn for each image.
        """
        device, side = normalised.device, normalised.shape[3]
        numbers = rng.uniform("erase", 7)  # [B, 7]
        index = (numbers[:, 0] < self.erase).nonzero().squeeze(1)
        if not len(index):
            return normalised
        numbers = numbers[index]
        left, top, width, height = rectangles(numbers[:, 1:5], ERASE_AREA, ERASE_ASPECT).unbind(1)
        edges = torch.stack([left, top, left + width, top + height], dim=1)
        inside = _inside((edges * side).round().long().to(device, non_blocking=True), side)
        offsets = (numbers[:, 5:] * (side + 1)).long().to(device, non_blocking=True)
        noise = _windows(_noise(side, device), offsets, side).to(normalised.dtype)
        index = index.to(device, non_blocking=True)
        part = torch.where(inside[:, None], noise, normalised.index_select(0, index))
        return normalised.index_copy(0, index, part)

    def _randaugmented(self, images: Tensor, rng: SampleRng) -> Tensor:
        images = images.clone()  # what comes in is the caller's
        for numbers in rng.uniform("randaugment", ROUNDS, 3).unbind(1):
            pick, noise, sign = numbers.unbind(1)  # [B] each
            magnitude = self.randaugment + MAGNITUDE_STD * torch.special.ndtri(noise)
            operate_(
                images,
                (pick * len(OPERATIONS) / PROBABILITY).long(),  # past the last: no operation
                magnitude.clamp(0, MAGNITUDE_MAX) / MAGNITUDE_MAX,
                torch.where(sign < 0.5, -1.0, 1.0),
            )
        return images


@dataclass(frozen=True)
class Mixing:
    """Mixup (arXiv 1710.09412) and CutMix (1905.04899) between neighbours in the batch.

    Samples 2i and 2i + 1 are mixed with each other, by the draws of the even one; where both kinds
    are on, half of the pairs are cut. An odd one at the end stays as it is. Processes that share a
    batch do as one would as long as every part begins at an even place.
    """

    mixup: float = 0.0  # alpha of the Beta distribution that shares are drawn from; 0 = off
    cutmix: float = 0.0  # the same
    smoothing: float = 0.0  # share of a target that is spread over all classes

    def __post_init__(self) -> None:
        _check("mixup", self.mixup, 0, math.inf)
        _check("cutmix", self.cutmix, 0, math.inf)
        _check("smoothing", self.smoothing, 0, 1)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, classes: int, rng: SampleRng
    ) -> tuple[Tensor, Tensor]:
        """Float images [B, 3, S, S] and labels int64 [B], to images and float32 [B, classes].

        Every target sums to one.
        """
        targets = F.one_hot(labels, classes).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / classes
        pairs, side = len(images) // 2, images.shape[3]
        if not pairs or not (self.mixup or self.cutmix):
            return images, targets
        numbers = rng.uniform("mixing", 4)[: 2 * pairs : 2]  # [p, 4]
        weight, edges = self._shares(numbers, side)
        cut = (edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1]) / side**2
        share = (weight * (1 - cut)).to(images.device, non_blocking=True)
        weight, edges = (part.to(images.device, non_blocking=True) for part in (weight, edges))
        per_pixel = torch.where(_inside(edges, side), 0, weight[:, None, None])  # [p, S, S]
        per_pixel = per_pixel[:, None].to(images.dtype)
        return _mixed(images, per_pixel), _mixed(targets, share[:, None])

    def _shares(self, numbers: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """How much each pair's images keep of themselves, of numbers [p, 4] in [0, 1).

        Float32 [p] outside of a box, and the box's int64 [p, 4] edges. Mixup has an empty box,
        CutMix keeps all outside of it.
        """
        kind, quantile, x, y = numbers.unbind(1)
        both = bool(self.mixup and self.cutmix)
        cut = kind < (0.5 if both else float(self.cutmix > 0))
        alpha = torch.where(cut, self.cutmix, self.mixup).double().numpy()
        own = torch.from_numpy(betaincinv(alpha, alpha, quantile.double().numpy())).float()
        half = (1 - own).sqrt() * cut / 2
        edges = torch.stack([x - half, y - half, x + half, y + half], dim=1).clamp(0, 1)
        return torch.where(cut, 1.0, own), (edges * side).round().long()


def _mixed(values: Tensor, weight: Tensor) -> Tensor:
    """Every two of values [B, ...] mixed; weight [p, ...]: how much each keeps of itself."""
    pairs = len(weight)
    two = values[: 2 * pairs].reshape(pairs, 2, *values.shape[1:])
    mixed = torch.lerp(two.flip(1), two, weight[:, None]).flatten(0, 1)
    return torch.cat([mixed, values[2 * pairs :]])


def rectangles(numbers: Tensor, area: tuple[float, float], aspect: tuple[float, float]) -> Tensor:
    """Left, top, width and height as shares of the side: [n, 4] in [0, 1) to float32 [n, 4].

    The area is uniform, width over height log-uniform, the place uniform. A side that does not fit
    is cut to the image's, where MAE's code draws up to ten times and gives up.
    """
    least, most = area
    share = least + (most - least) * numbers[:, 0]
    narrowest, widest = map(math.log, aspect)
    ratio = (narrowest + (widest - narrowest) * numbers[:, 1]).exp()
    width, height = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    left, top = numbers[:, 2] * (1 - width), numbers[:, 3] * (1 - height)
    return torch.stack([left, top, width, height], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """The `boxes` [B, 4] (see `rectangles`) of images [B, 3, S, S] at `size`, mirrored if so told.

    Bicubic without a filter: a box of many more pixels than `size` x `size` aliases. Decode images
    little larger than the model's.
    """
    left, top, width, height = boxes.unbind(1)
    matrices = torch.zeros(len(boxes), 2, 3)
    matrices[:, 0, 0] = torch.where(flipped, -width, width)
    matrices[:, 1, 1] = height
    matrices[:, 0, 2] = 2 * left + width - 1
    matrices[:, 1, 2] = 2 * top + height - 1
    grid = sampling_grid(matrices.to(images.device, non_blocking=True), size)
    crops = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return crops.clamp_(0, 1)  # bicubic overshoots


def centre(images: Tensor, size: int) -> Tensor:
    """The middle [B, 3, size, size] of images. Raises ValueError where they are smaller."""
    margin = images.shape[3] - size
    if margin < 0:
        raise ValueError(f"images of {images.shape[3]} pixels have no middle of {size}")
    start = margin // 2
    return images[:, :, start : start + size, start : start + size]


def mirror(images: Tensor, flipped: Tensor) -> Tensor:
    """Images [B, 3, S, S], mirrored where `flipped` [B], on the CPU, says so."""
    if not flipped.any():
        return images
    index = flipped.nonzero().squeeze(1).to(images.device, non_blocking=True)
    return images.index_copy(0, index, images.index_select(0, index).flip(3))


def move(images: Tensor, steps: Tensor) -> Tensor:
    """Every image [3, S, S] moved `steps` int64 [B, 2] pixels left and up, its edges reflected."""
    last = images.shape[3] - 1
    source = torch.arange(last + 1) + steps[:, :, None]  # [B, 2, S]
    source = last - (last - source.abs()).abs()  # back into the image, as a mirror has it
    columns, rows = source.to(images.device, non_blocking=True).unbind(1)
    images = images.gather(3, columns[:, None, None, :].expand_as(images))
    return images.gather(2, rows[:, None, :, None].expand_as(images))


def _inside(edges: Tensor, side: int) -> Tensor:
    """Pixels of boxes int64 [n, 4] (left, top, right, bottom): bool [n, side, side]."""
    place = torch.arange(side, device=edges.device)
    left, top, right, bottom = edges[:, :, None].unbind(1)  # [n, 1] each
    columns = (place >= left) & (place < right)  # [n, side]
    rows = (place >= top) & (place < bottom)
    return rows[:, :, None] & columns[:, None, :]


@cache
def _noise(side: int, device: torch.device) -> Tensor:
    """float32 [3, 2 * side, 2 * side] of N(0, 1), ever the same."""
    tile = torch.randn(3, 2 * side, 2 * side, generator=generator("erase"))
    return tile.to(device)


def _windows(tile: Tensor, offsets: Tensor, side: int) -> Tensor:
    """The windows of tile [3, T, T] at offsets int64 [n, 2]: [n, 3, side, side]."""
    place = torch.arange(side, device=tile.device)
    rows, columns = (offsets[:, :, None] + place).unbind(1)  # [n, side] each
    return tile[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is not between {low} and {high}")
