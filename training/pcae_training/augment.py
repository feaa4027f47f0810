"""Augment a batch on its device: crops, RandAugment, erasing, mixup and CutMix.

All random numbers come from `SampleRng` on the CPU, so no device sync is needed to know which image
gets which operation, and several processes augment a batch exactly as one. (kornia's random modules
draw from global state, and one operation for a whole batch.) Images are square RGB.
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

#: Area of an erased rectangle as a share of the image, and its width over height.
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)

#: RandAugment as in MAE's fine-tuning: operations per image, the probability of each, the standard
#: deviation of its magnitude, and the largest magnitude.
ROUNDS = 2
PROBABILITY = 0.5
MAGNITUDE_STD = 0.5
MAGNITUDE_MAX = 10


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images; everything is off by default."""

    size: int  # side of the result, in pixels
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
        """Return augmented float images [B, 3, size, size] of images [B, 3, S, S], all in [0, 1].

        Without random crops the centre is taken; raise ValueError if S is below `size`. Erasing is
        separate, see `erase_rectangles`.
        """
        # Colours and coordinates need float32, also under autocast.
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
                images = self._randaugment(images, rng)
        return images

    @torch.no_grad()
    def erase_rectangles(self, normalised: Tensor, rng: SampleRng) -> Tensor:
        """Replace a rectangle of some normalised images [B, 3, size, size] by noise of N(0, 1).

        The noise is a window of a fixed tile, at a random offset for each image.
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

    def _randaugment(self, images: Tensor, rng: SampleRng) -> Tensor:
        images = images.clone()  # the argument is not changed
        for numbers in rng.uniform("randaugment", ROUNDS, 3).unbind(1):
            pick, noise, sign = numbers.unbind(1)  # [B] each
            magnitude = self.randaugment + MAGNITUDE_STD * torch.special.ndtri(noise)
            operate_(
                images,
                (pick * len(OPERATIONS) / PROBABILITY).long(),  # beyond the last: no operation
                magnitude.clamp(0, MAGNITUDE_MAX) / MAGNITUDE_MAX,
                torch.where(sign < 0.5, -1.0, 1.0),
            )
        return images


@dataclass(frozen=True)
class Mixing:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) between neighbours in the batch.

    Samples 2i and 2i + 1 are mixed with each other, with the random numbers of the even one. If
    both are on, half of the pairs use CutMix. A last odd sample is not mixed. The result does not
    depend on the number of processes if every part of the batch starts at an even index.
    """

    mixup: float = 0.0  # alpha of the Beta distribution of mixing weights; 0 = off
    cutmix: float = 0.0  # the same for CutMix
    smoothing: float = 0.0  # share of a target that is spread over all classes, or yes and no

    def __post_init__(self) -> None:
        _check("mixup", self.mixup, 0, math.inf)
        _check("cutmix", self.cutmix, 0, math.inf)
        _check("smoothing", self.smoothing, 0, 1)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, classes: int, rng: SampleRng
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images [B, 3, S, S] and targets float32 [B, classes].

        images: float [B, 3, S, S]. labels: int64 [B], whose targets sum to one; or sets of labels,
        bool [B, classes], each a target of its own.
        """
        if labels.ndim == 2:
            targets, spread = labels.float(), 1 / 2
        else:
            targets, spread = F.one_hot(labels, classes).float(), 1 / classes
        targets = targets * (1 - self.smoothing) + self.smoothing * spread
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
        return _mix(images, per_pixel), _mix(targets, share[:, None])

    def _shares(self, numbers: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return each pair's own weight outside of a box, float32 [p], and the box, int64 [p, 4].

        numbers [p, 4] in [0, 1). Mixup has an empty box; CutMix has weight 1 outside of its box and
        0 inside.
        """
        kind, quantile, x, y = numbers.unbind(1)
        both = bool(self.mixup and self.cutmix)
        cut = kind < (0.5 if both else float(self.cutmix > 0))
        alpha = torch.where(cut, self.cutmix, self.mixup).double().numpy()
        own = torch.from_numpy(betaincinv(alpha, alpha, quantile.double().numpy())).float()
        half = (1 - own).sqrt() * cut / 2
        edges = torch.stack([x - half, y - half, x + half, y + half], dim=1).clamp(0, 1)
        return torch.where(cut, 1.0, own), (edges * side).round().long()


def _mix(values: Tensor, weight: Tensor) -> Tensor:
    """Mix neighbours in values [B, ...]; weight [p, ...] is the share that each keeps of itself."""
    pairs = len(weight)
    two = values[: 2 * pairs].reshape(pairs, 2, *values.shape[1:])
    mixed = torch.lerp(two.flip(1), two, weight[:, None]).flatten(0, 1)
    return torch.cat([mixed, values[2 * pairs :]])


def rectangles(numbers: Tensor, area: tuple[float, float], aspect: tuple[float, float]) -> Tensor:
    """Return left, top, width and height, float32 [n, 4], relative to the image's side.

    numbers: [n, 4] in [0, 1). The area is uniform, width over height log-uniform, the position
    uniform. A side longer than the image is cut to it; MAE's code redraws, up to ten times.
    """
    least, most = area
    share = least + (most - least) * numbers[:, 0]
    narrowest, widest = map(math.log, aspect)
    ratio = (narrowest + (widest - narrowest) * numbers[:, 1]).exp()
    width, height = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    left, top = numbers[:, 2] * (1 - width), numbers[:, 3] * (1 - height)
    return torch.stack([left, top, width, height], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Resize the `boxes` [B, 4] (see `rectangles`) of images [B, 3, S, S] to `size`.

    flipped [B]: which of them to mirror. Bicubic without antialiasing, so images should be decoded
    at a size little above the model's.
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
    """Return the centre [B, 3, size, size] of images. Raise ValueError if they are smaller."""
    margin = images.shape[3] - size
    if margin < 0:
        raise ValueError(f"cannot crop {size} pixels out of images of {images.shape[3]}")
    start = margin // 2
    return images[:, :, start : start + size, start : start + size]


def mirror(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images [B, 3, S, S] that `flipped` [B], on the CPU, selects."""
    if not flipped.any():
        return images
    index = flipped.nonzero().squeeze(1).to(images.device, non_blocking=True)
    return images.index_copy(0, index, images.index_select(0, index).flip(3))


def move(images: Tensor, steps: Tensor) -> Tensor:
    """Shift each image by `steps` int64 [B, 2] pixels left and up, with reflected edges."""
    last = images.shape[3] - 1
    source = torch.arange(last + 1) + steps[:, :, None]  # [B, 2, S]
    source = last - (last - source.abs()).abs()  # reflected at the edges
    columns, rows = source.to(images.device, non_blocking=True).unbind(1)
    images = images.gather(3, columns[:, None, None, :].expand_as(images))
    return images.gather(2, rows[:, None, :, None].expand_as(images))


def _inside(edges: Tensor, side: int) -> Tensor:
    """Return the mask of boxes int64 [n, 4] (left, top, right, bottom): bool [n, side, side]."""
    place = torch.arange(side, device=edges.device)
    left, top, right, bottom = edges[:, :, None].unbind(1)  # [n, 1] each
    columns = (place >= left) & (place < right)  # [n, side]
    rows = (place >= top) & (place < bottom)
    return rows[:, :, None] & columns[:, None, :]


@cache
def _noise(side: int, device: torch.device) -> Tensor:
    """Return a fixed tile of noise N(0, 1), float32 [3, 2 * side, 2 * side]."""
    tile = torch.randn(3, 2 * side, 2 * side, generator=generator("erase"))
    return tile.to(device)


def _windows(tile: Tensor, offsets: Tensor, side: int) -> Tensor:
    """Return the windows of tile [3, T, T] at offsets int64 [n, 2]: [n, 3, side, side]."""
    place = torch.arange(side, device=tile.device)
    rows, columns = (offsets[:, :, None] + place).unbind(1)  # [n, side] each
    return tile[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is not between {low} and {high}")
