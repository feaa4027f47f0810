"""Image files decoded like requests, and generated images."""

from pathlib import Path

import numpy as np

from pcae_export.images import decode, generate
from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.data import load
from tests.support.exporting import PREPROCESS


def test_files_are_decoded_as_requests_are(data: Path) -> None:
    images = load(str(data), "test", PREPROCESS, labelled=False)
    pixels = decode(images, [70, 3])
    assert pixels.shape == (2, 16, 16, 3)
    assert pixels.dtype == np.uint8
    for found, row in zip(pixels, (70, 3), strict=True):
        np.testing.assert_array_equal(found, PREPROCESS(images.body(row)))


def test_files_are_squashed_where_the_model_wants_it(data: Path) -> None:
    squash = Preprocess(16, 16, PREPROCESS.mean, PREPROCESS.std, squash=True)
    images = load(str(data), "test", squash, labelled=False)
    assert (decode(images, [0]) != decode(load(str(data), "test", PREPROCESS), [0])).any()


def test_generated_images_are_always_the_same_and_each_its_own() -> None:
    pixels = generate(3, 30)
    assert pixels.shape == (3, 30, 30, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, generate(3, 30))
    assert (pixels[0] != pixels[1]).any()
    for channel in np.moveaxis(pixels, 3, 0).reshape(9, -1):
        assert channel.std() > 20
        assert len(np.unique(channel)) > 100


def test_no_two_patches_of_a_generated_image_are_equal() -> None:
    for image in generate(4, 56):
        patches = image.reshape(14, 4, 14, 4, 3).swapaxes(1, 2).reshape(196, -1)
        assert len(np.unique(patches, axis=0)) == 196


def test_the_further_apart_the_less_alike_as_in_photographs() -> None:
    pixels = generate(2, 64).astype(float)
    apart = [np.abs(pixels[:, by:] - pixels[:, :-by]).mean() for by in (1, 2, 4, 8, 16, 32)]
    assert apart == sorted(apart)
    assert apart[0] < 0.6 * apart[-1]  # of noise they are all equal
