"""--classes-from, by the command: a backbone and class folders become a classifier."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcae_serve.bundle.probabilities import softmax
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from tests.support.exporting import bundled, fails

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}
TIERS = ("--tier", "low=0.5", "--tier", "full=1.0", "--half", "none")


def write_photos(root: Path, each: int = 8, colours: Any = COLOURS) -> Path:
    """Images of 16 x 16 noisy pixels: <root>/<colour>/<number>.png."""
    draw = np.random.default_rng(each)
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            noise = draw.normal(0, 40, (16, 16, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def backbone(tiny: Callable[..., Checkpoint], tmp_path: Path) -> Path:
    small = tiny(classes=0, depth=2, reduction_points=(0,))  # tracing takes time for each stage
    checkpoints.save(replace(small, labels=[]), tmp_path / "backbone")
    return tmp_path / "backbone"


def test_photographs_become_classes(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos")
    bundle = bundled(backbone, tmp_path / "out", *TIERS, "--classes-from", photos)
    assert bundle.labels == tuple(COLOURS)
    for tier in bundle.tiers:
        assert tier.accuracy is not None
        assert (tier.accuracy.n, tier.accuracy.top1) == (24, 1)
        assert tier.accuracy.data_set == "photos/train (5-fold cross-validation of the head)"
    engine = OnnxRuntimeEngine(bundle)
    fresh = write_photos(tmp_path / "fresh", each=4)
    files = sorted(fresh.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    for tier in bundle.tiers:
        found = softmax(engine.run(tier, pixels).vectors)
        named = [bundle.labels[place] for place in found.argmax(axis=1)]
        assert named == [file.parent.name for file in files]
        assert found.max(axis=1).mean() > 0.8
    card = (bundle.root / "README.md").read_text()
    out = capsys.readouterr().out
    for text in (card, out):
        assert "| ridge | one head, fitted at all keep ratios | 100.0 | 100.0 |" in text
        assert "A head per keep ratio has +0.00" in text


def test_copies_do_not_inflate_the_cross_validation(
    tiny: Callable[..., Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of grey noise, a head is right only about photographs that it has seen."""
    checkpoints.save(replace(tiny(classes=0), labels=[]), tmp_path / "backbone")
    grey = dict.fromkeys(COLOURS, (128, 128, 128))
    photos = write_photos(tmp_path / "photos", 10, grey)
    for number, name in enumerate(grey):
        shown = np.random.default_rng(number).integers(0, 256, (10, 16, 16, 3), np.uint8)
        for place, pixels in enumerate(shown):
            for copy in range(3):
                Image.fromarray(pixels).save(photos / name / f"{place}-{copy}.png")
            (photos / name / f"{place}.png").unlink()
    words = ("--classes-from", photos, "--reduction", "ptr")
    bundle = bundled(tmp_path / "backbone", tmp_path / "out", *TIERS, *words)
    for tier in bundle.tiers:
        assert tier.accuracy is not None
        assert tier.accuracy.n == 30
        assert tier.accuracy.top1 < 0.75
    text = "60 of 90 photographs of photos/train are left out: each is a copy of one that is used"
    assert f"warning: {text}" in capsys.readouterr().err
    assert text in (bundle.root / "README.md").read_text()


@pytest.mark.slow
def test_images_apart_measure_the_tiers(made: Any, data: Path, tmp_path: Path) -> None:
    """--eval-data has the same classes, and the reduction rule is chosen once."""
    bundle = bundled(
        made.checkpoint, tmp_path / "out", *TIERS,
        "--classes-from", data, "--classes-split", "test", "--eval-data", data,
        "--reduction", "auto",
    )  # fmt: skip
    card = (bundle.root / "README.md").read_text()
    assert card.count("Reductions compared on these weights") == 1  # not again after the head
    assert {tier.accuracy.n for tier in bundle.tiers if tier.accuracy} == {72}


@pytest.mark.slow
def test_a_head_is_replaced_with_a_note(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos")
    bundle = bundled(made.checkpoint, tmp_path / "out", *TIERS, "--classes-from", photos)
    assert bundle.labels == tuple(COLOURS)
    assert "(3 classes) is replaced" in capsys.readouterr().err


@pytest.mark.slow
def test_a_distilled_backbone_has_the_head_twice(
    tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """Its answer is the mean of two heads, and its features are the mean of two tokens."""
    distilled = replace(tiny(classes=0, pooling="cls", distilled=True), labels=[])
    checkpoints.save(distilled, tmp_path / "backbone")
    photos = write_photos(tmp_path / "photos")
    bundle = bundled(tmp_path / "backbone", tmp_path / "out", *TIERS, "--classes-from", photos)
    engine = OnnxRuntimeEngine(bundle)
    files = sorted(photos.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    found = engine.run(bundle.tiers[-1], pixels).vectors.argmax(axis=1)
    assert [bundle.labels[place] for place in found] == [file.parent.name for file in files]


@pytest.mark.parametrize(
    ("photos", "message"),
    [
        ({"red": 8}, "has only one class, 'red': at least two are needed"),
        ({"red": 1, "blue": 1}, "fewer than two different readable photographs of blue, red"),
        ({"red": 8, "blue": 1}, "fewer than two different readable photographs of blue;"),
    ],
)
def test_photographs_that_are_too_few(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    photos: dict[str, int], message: str,
) -> None:  # fmt: skip
    for name, count in photos.items():
        write_photos(tmp_path / "photos", count, {name: COLOURS[name]})
    words = ("bundle", backbone, tmp_path / "out", *TIERS, "--classes-from", tmp_path / "photos")
    assert message in fails(capsys, 1, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--labels", "x.txt"), "--classes-from names the classes; omit --labels"),
        (("--features",), "omit --features"),
        (("--answers", "labels"), "omit --answers"),
        (("--agreement",), "--classes-from measures top-1; omit --agreement"),
        (("--tier", "a=0.5:int8"), "is not known from --classes-from; give --eval-data"),
        (("--tier", "a=other@0.5"), "makes a classifier of one model; give one SOURCE"),
    ],
)
def test_flags_that_contradict(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert message in fails(capsys, 2, "bundle", "IN", "OUT", "--classes-from", "photos", *flags)
