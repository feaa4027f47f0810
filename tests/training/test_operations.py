from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from pcae_training.operations import OPERATIONS, operate_, sampling_grid

SIDE = 28


def pictures(batch: int) -> Tensor:
    """Smooth pictures of whole 8-bit levels that reach neither black nor white."""
    coarse = torch.rand(batch, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
    return (smooth.clamp(0, 1) * 200 + 20).round() / 255


def operated(images: Tensor, name: str, strength: float, sign: int = 1) -> Tensor:
    """Every image after the operation `name`."""
    images, each = images.clone(), torch.ones(len(images))
    operate_(images, (each * OPERATIONS.index(name)).long(), each * strength, each * sign)
    return images


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def levels_apart(image: Tensor, expected: Image.Image) -> NDArray[np.float32]:
    """How far each number is from PIL's, in 8-bit levels: [S, S, 3]."""
    found: NDArray[np.float32] = image.permute(1, 2, 0).numpy() * 255
    return np.abs(found - np.asarray(expected, np.float32))


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("AutoContrast", 0.9, ImageOps.autocontrast),
        ("Equalize", 0.9, ImageOps.equalize),
        ("Invert", 0.9, ImageOps.invert),
        ("Posterize", 0.0, lambda image: ImageOps.posterize(image, 4)),
        ("Posterize", 0.6, lambda image: ImageOps.posterize(image, 2)),
        ("Posterize", 0.9, lambda image: ImageOps.posterize(image, 1)),
        ("Solarize", 0.0, lambda image: image),
        ("Solarize", 0.5, lambda image: ImageOps.solarize(image, 128)),
        ("Solarize", 0.9, lambda image: ImageOps.solarize(image, 26)),
        ("SolarizeAdd", 0.9, lambda image: image.point(lambda v: v + 99 if v < 128 else v)),
        ("Color", 0.9, lambda image: ImageEnhance.Color(image).enhance(1.81)),
        ("Contrast", 0.9, lambda image: ImageEnhance.Contrast(image).enhance(1.81)),
        ("Brightness", 0.5, lambda image: ImageEnhance.Brightness(image).enhance(1.45)),
        ("Sharpness", 0.9, lambda image: ImageEnhance.Sharpness(image).enhance(1.81)),
    ],
)
def test_colour_operations_are_pils(name: str, strength: float, expected: Any) -> None:
    images = pictures(3)
    for image, done in zip(images, operated(images, name, strength), strict=True):
        assert levels_apart(done, expected(pil(image))).max() <= 1.5


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
@pytest.mark.parametrize(("strength", "factor"), [(0.5, 0.55), (1.0, 0.1)])
def test_colour_operations_turn_with_the_sign(name: str, strength: float, factor: float) -> None:
    image = pictures(1)
    expected = getattr(ImageEnhance, name)(pil(image[0])).enhance(factor)
    done = operated(image, name, strength, sign=-1)[0]
    assert levels_apart(done, expected).max() <= 1.5


def rotation(degrees: float) -> Any:
    def rotate(image: Image.Image) -> Image.Image:
        return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)

    return rotate


def affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Any:
    def transform(image: Image.Image) -> Image.Image:
        data = (a, b, c, d, e, f)
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            data,
            Image.Resampling.BILINEAR,
            fillcolor=(128,) * 3,
        )

    return transform


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Rotate", lambda s: rotation(15 * s)),
        ("ShearX", lambda s: affine(1, 0.15 * s, 0, 0, 1, 0)),
        ("ShearY", lambda s: affine(1, 0, 0, 0.15 * s, 1, 0)),
        ("TranslateX", lambda s: affine(1, 0, 0.225 * SIDE * s, 0, 1, 0)),
        ("TranslateY", lambda s: affine(1, 0, 0, 0, 1, 0.225 * SIDE * s)),
    ],
)
def test_geometric_operations_are_pils(name: str, expected: Any, sign: int) -> None:
    images = pictures(3)
    for image, done in zip(images, operated(images, name, 0.5, sign), strict=True):
        apart = levels_apart(done, expected(sign)(pil(image)))
        assert np.mean(apart <= 1.5) > 0.9  # PIL draws the seam to the filling sharper
        assert (apart[9:-9, 9:-9] <= 1.5).all()


def test_each_image_gets_its_own_operation() -> None:
    images = pictures(len(OPERATIONS) + 1)
    strength = torch.linspace(0.2, 1, len(images))
    done = images.clone()
    operate_(done, torch.arange(len(images)), strength, torch.ones(len(images)))
    for i, name in enumerate(OPERATIONS):
        alone = operated(images[i : i + 1], name, strength[i].item())
        assert not torch.equal(alone[0], images[i])
        torch.testing.assert_close(done[i], alone[0])
    assert torch.equal(done[-1], images[-1])  # beyond the operations


def test_autocontrast_leaves_a_single_level() -> None:
    flat = torch.full((1, 3, 8, 8), 0.25)
    assert torch.equal(operated(flat, "AutoContrast", 0.9), flat)


def test_a_grid_is_torchs() -> None:
    matrices = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(2))
    expected = F.affine_grid(matrices, [4, 3, 7, 7], align_corners=False)
    torch.testing.assert_close(sampling_grid(matrices, 7), expected)
