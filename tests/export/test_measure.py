"""What tiers are worth: top-1, agreement and cosine, each against a count by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_export.measure import Quality, cosine, measure_quality
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_training.data import LabelledImages, load
from pcae_training.score import Top1
from tests.support.exporting import PREPROCESS

ROWS = [71, 0, 30, 5, 40, 12, 60, 33, 25, 2, 9]  # a whole batch, and a short one


class Known(SimulatedEngine):
    """Answers by the image's mean colour; a tier that drops patches mixes up some of the images."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.ran: list[Tier] = []

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        self.ran.append(tier)
        vectors = answers(pixels)
        if tier.token_counts[0] < 64:
            mixed = pixels[:, 0, 0, 0] < 4 * tier.token_counts[0]
            vectors[mixed] = np.roll(vectors[mixed], 1, axis=1)
        return Output(vectors, ())


def answers(pixels: Pixels) -> Any:
    """Three numbers for each image, none like another."""
    vectors = pixels.mean(axis=(1, 2), dtype=np.float32)
    return vectors - vectors.mean(axis=1, keepdims=True)


@pytest.fixture
def images(data: Path) -> LabelledImages:
    return load(str(data), "test", PREPROCESS)


def found(bundle: Bundle, images: LabelledImages, labelled: bool) -> dict[str, Quality]:
    measured = measure_quality(bundle, Known(bundle), images, ROWS, labelled)
    assert set(measured) == {"low", "mid", "full"}
    worth = {name: each.quality for name, each in measured.items()}
    assert {(q.n, q.data_set) for q in worth.values()} == {(len(ROWS), images.name)}
    assert {each.scores.shape for each in measured.values()} == {(len(ROWS),)}
    return worth


def by_hand(bundle: Bundle, images: LabelledImages, name: str) -> tuple[Any, Any, Any]:
    """The tier's answers, those of k = 1.0 and the labels of ROWS, an image at a time."""
    tier = next(tier for tier in bundle.tiers if tier.name == name)
    pixels = [images[row][0].permute(1, 2, 0).numpy()[None] for row in ROWS]
    ours = np.concatenate([Known(bundle).run(tier, one).vectors for one in pixels])
    return ours, np.concatenate([answers(one) for one in pixels]), images.labels[ROWS].numpy()


def test_top1_where_there_are_labels(made: Any, images: LabelledImages) -> None:
    for name, worth in found(made.bundle, images, True).items():
        ours, _, labels = by_hand(made.bundle, images, name)
        hits = int((ours.argmax(axis=1) == labels).sum())
        assert isinstance(worth, Accuracy)
        assert worth.top1 == pytest.approx(hits / len(ROWS))
        assert worth.interval == Top1(hits, len(ROWS)).interval


def test_agreement_with_k_1_where_there_are_none(made: Any, images: LabelledImages) -> None:
    worth = found(made.bundle, images, False)
    for name, share in worth.items():
        ours, whole, _ = by_hand(made.bundle, images, name)
        assert isinstance(share, Agreement)
        assert share.share == pytest.approx((ours.argmax(1) == whole.argmax(1)).mean())
    assert worth["full"].share == 1  # type: ignore[union-attr]
    assert worth["low"].share < 1  # type: ignore[union-attr]


def test_cosine_to_k_1_where_there_is_no_head(made: Any, images: LabelledImages) -> None:
    manifest = made.bundle.manifest
    model = manifest.models["vit"].model_copy(update={"answers": "features"})
    headless = manifest.model_copy(update={"models": {"vit": model}, "labels": ()})
    bundle = replace(made.bundle, manifest=headless)
    worth = found(bundle, images, False)
    for name, near in worth.items():
        ours, whole, _ = by_hand(bundle, images, name)
        assert isinstance(near, Fidelity)
        assert near.cosine == pytest.approx(float(cosine(ours, whole).mean()), abs=1e-6)
    assert worth["full"].cosine == pytest.approx(1)  # type: ignore[union-attr]
    assert worth["full"].cosine <= 1  # type: ignore[union-attr]


def test_independent_labels_agree_if_the_same_ones_apply(made: Any, images: LabelledImages) -> None:
    manifest = made.bundle.manifest
    model = manifest.models["vit"].model_copy(update={"answers": "labels"})
    bundle = replace(made.bundle, manifest=manifest.model_copy(update={"models": {"vit": model}}))
    worth = found(bundle, images, False)
    for name, share in worth.items():
        ours, whole, _ = by_hand(bundle, images, name)
        assert isinstance(share, Agreement)
        assert share.share == pytest.approx(((ours >= 0) == (whole >= 0)).all(axis=1).mean())
    assert worth["low"].share < worth["full"].share == 1  # type: ignore[union-attr]


def test_k_1_is_the_models_own_in_float32_whether_or_not_it_is_a_tier(
    made: Any, images: LabelledImages
) -> None:
    cheap = made.bundle.tiers[0].model_copy(update={"precision": "int8"})
    manifest = made.bundle.manifest.model_copy(update={"tiers": (cheap,)})
    engine = Known(made.bundle)
    measure_quality(replace(made.bundle, manifest=manifest), engine, images, ROWS[:2], False)
    whole, tier = engine.ran
    assert (whole.token_counts, whole.precision) == ((64, 64, 64), "float32")
    assert (tier.token_counts, tier.precision) == (cheap.token_counts, "int8")


def test_cosine_of_rows() -> None:
    one = np.array([[1, 0], [1, 1], [2, 0]], np.float32)
    other = np.array([[0, 3], [2, 2], [-1, 0]], np.float32)
    np.testing.assert_allclose(cosine(one, other), [0, 1, -1], atol=1e-6)
