"""Weights of classes, and balanced sampling, in training."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_training.augment import Mixing
from pcae_training.class_weights import read_weights, weigh_classes, weigh_images
from pcae_training.commands import Train
from pcae_training.data import LabelledImages, load
from pcae_training.evaluate import normalise
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare, weigh_by_flags
from pcae_training.sample_rng import SampleRng

PREPROCESS = Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3)
RUN: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "width": 8, "heads": 2, "depth": 11, "keep": 1.0,
    "epochs": 2, "batch_size": 8, "holdout": 4, "lr": 1e-2, "randaugment": 0,
}  # fmt: skip


@pytest.fixture
def photos(class_folders: Any) -> Path:
    """12 bright images and 4 dark ones."""
    root = Path(class_folders(12))
    for file in sorted((root / "train" / "dark").iterdir())[4:]:
        file.unlink()
    return root


@pytest.fixture
def images(photos: Path) -> LabelledImages:
    return load(str(photos), "train", PREPROCESS)


def weigh(text: str, images: LabelledImages) -> Tensor:
    chosen: Any = read_weights(text)
    return weigh_classes(chosen, images.labels, images.classes, images.name)


def test_inverse_frequency_has_a_mean_of_one_over_the_images(images: LabelledImages) -> None:
    weights = weigh("auto", images)
    assert weights.tolist() == pytest.approx([16 / 24, 2.0])
    assert float(weights[images.labels].mean()) == pytest.approx(1)


def test_a_class_without_images_has_no_part_in_auto() -> None:
    weights = weigh_classes("auto", torch.tensor([0, 0, 2]), ["a", "b", "c"], "x")
    assert weights.tolist() == [0.75, 0, 1.5]


def test_weights_by_name_are_scaled_too(images: LabelledImages, tmp_path: Path) -> None:
    weights = weigh("dark=3", images)
    assert weights.tolist() == pytest.approx([16 / 24, 2.0])
    file = tmp_path / "weights.json"
    file.write_text('{"dark": 3, "bright": 1}')
    assert torch.equal(weigh(str(file), images), weights)
    assert weigh("bright=0, dark=1", images).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grey=2", "'grey' is not a class of images/train, which has 'bright', 'dark'"),
        ("dark=0,bright=0", "all classes with training images have a weight of 0"),
    ],
)
def test_weights_that_do_not_fit_the_images(
    images: LabelledImages, text: str, message: str
) -> None:
    with pytest.raises(PcaeError, match="--class-weights") as caught:
        weigh(text, images)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dark=-1", "the weight of 'dark' must be a number from 0 to 1e+06, not '-1'"),
        ("dark=inf", "the weight of 'dark' must be a number from 0 to 1e+06, not 'inf'"),
        ("dark=nan", "the weight of 'dark' must be a number from 0 to 1e+06, not 'nan'"),
        ("dark=much", "the weight of 'dark' must be a number from 0 to 1e+06, not 'much'"),
        ("dark=1,dark=2", "'dark' is given more than once"),
        ("dark", "must be auto, NAME=WEIGHT separated by commas, or a .json file, not 'dark'"),
        ("none.json", "cannot read none.json: No such file or directory"),
    ],
)
def test_what_cannot_be_a_weight(text: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FinetuneSettings(data="x", out=Path("y"), class_weights=text)
    assert message in str(caught.value)


def test_a_file_that_is_not_an_object_of_numbers(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    for content, message in (
        ("[1]", "must be an object"),
        ("{", "is not valid JSON"),
        ('{"dark": [1]}', "the weight of 'dark' must be a number"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_weights(str(file))


def test_an_images_weight_is_the_mean_of_its_labels_whatever_the_smoothing() -> None:
    weights, label = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0]])
    for smoothing in (0.0, 0.1):
        smoothed = label * (1 - smoothing) + smoothing / 3
        found = weigh_images(smoothed, smoothing, weights)
        torch.testing.assert_close(found, torch.tensor([0.5, 1.625]))


def test_the_loss_is_the_weighted_cross_entropy(photos: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(
        data=str(photos), out=tmp_path / "run", class_weights="auto",
        **RUN | {"mixup": 0, "cutmix": 0, "erase": 0, "crop": 0, "drop_path": 0, "flip": False},
    )  # fmt: skip
    start, data, holdout, _, new, weights = prepare(settings, report=False)
    assert weights is not None
    plain = Finetuning(start, settings, holdout)
    weighted = Finetuning(start, settings, holdout, None, new, weights)
    assert isinstance(data, LabelledImages)
    pixels = torch.stack([data[i][0] for i in (0, 1, len(data) - 1)])
    labels = torch.tensor([0, 0, 1])

    def loss(objective: Finetuning, rows: list[int]) -> float:
        draws = SampleRng(0, 0, len(rows))
        return float(objective(pixels[rows], labels[rows], draws, progress=0.5).detach())

    each = torch.tensor([loss(plain, [row]) for row in range(3)])
    expected = float((each * weights[labels]).mean())
    assert loss(weighted, [0, 1, 2]) == pytest.approx(expected, rel=1e-4)
    assert F.mse_loss(each, each * weights[labels]) > 0


def test_the_weight_follows_the_mixed_label_and_not_teachers(photos: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(
        data=str(photos), out=tmp_path / "run", class_weights="dark=3", teacher_share=0.25,
        **RUN | {"erase": 0, "crop": 0, "drop_path": 0, "flip": False},
    )  # fmt: skip
    start, data, holdout, _, new, weights = prepare(settings, report=False)
    assert weights is not None
    assert isinstance(data, LabelledImages)

    def teach(images: Tensor) -> Tensor:
        return torch.tensor([[0.9, 0.1]]).expand(len(images), -1)

    teachers: Any = teach
    objective = Finetuning(start, settings, holdout, teachers, new, weights)
    rows = [0, len(data) - 1, len(data) - 2, 1]
    pixels, labels = torch.stack([data[i][0] for i in rows]), torch.tensor([0, 1, 1, 0])
    draws = SampleRng(0, 3, len(rows))
    found = objective(pixels, labels, draws, progress=0.5)

    images = normalise(objective.augment(pixels.float() / 255, draws) * 255, PREPROCESS)
    unsmoothed = Mixing(settings.mixup, settings.cutmix)
    images, parts = unsmoothed(images, labels, 2, draws)  # the parts of the two labels
    assert 0 < parts[0, 0] < 1
    targets = parts * 0.9 + 0.1 / 2
    targets = targets * 0.75 + teach(images) * 0.25
    each = -(targets * objective.model(images).log_softmax(dim=1)).sum(dim=1)
    expected = (each * (parts * weights).sum(dim=1)).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_balanced_sampling_shows_each_class_equally_often(images: LabelledImages) -> None:
    images.balanced = True
    whole = images.epoch(3, 1, [slice(0, 16)], torch.device("cpu"))
    ((pixels, labels),) = whole
    assert torch.bincount(labels).tolist() == [8, 8]
    parts = images.epoch(3, 1, [slice(0, 4), slice(8, 16)], torch.device("cpu"))
    first, last = parts  # a process's share, or a resumed run's
    assert torch.equal(first[0], pixels[:4])
    assert torch.equal(last[1], labels[8:])


def test_the_flags(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
    common = ["finetune", "--data", str(photos), *flags]
    for name, extra in (("a", ["--class-weights", "auto"]), ("b", ["--balance"])):
        assert run(Train, [*common, "--out", str(tmp_path / name), *extra]) == 0
        printed = capsys.readouterr()
        assert ("class weights: dark 2, bright 0.667" in printed.err) == (name == "a")
    assert run(Train, [*common, "--out", str(tmp_path / "c"), "--class-weights", "grey=1"]) == 1
    assert "'grey' is not a class" in capsys.readouterr().err
    assert run(Train, [*common, "--balance", "--class-weights", "auto", "--dry-run"]) == 2
    assert "omit --class-weights" in capsys.readouterr().err
    for stream in (["--balance"], ["--class-weights", "auto"]):
        extra = ["--stream", "--epoch-size", "8", "--eval-data", str(photos), "--dry-run"]
        sizes = [flag for flag in flags if not flag.startswith("--holdout")]
        assert run(Train, ["finetune", "--data", str(photos), *sizes, *extra, *stream]) == 2
        assert f"{stream[0]} needs the labels of all images" in capsys.readouterr().err


def test_lists_of_labels_are_refused(tmp_path: Path, photos: Path) -> None:
    settings = FinetuneSettings(data=str(photos), out=tmp_path / "run", balance=True, **RUN)
    with mock.patch.object(LabelledImages, "several", True), pytest.raises(PcaeError) as caught:
        weigh_by_flags(settings, load(str(photos), "train", PREPROCESS))
    assert "has lists of labels; --balance needs one class an image" in str(caught.value)


def test_a_run_with_other_weights_is_not_resumed(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text('{"dark": 3}')
    fixed: dict[str, Any] = {"data": str(photos), "out": tmp_path / "run", **RUN}
    finetune(FinetuneSettings(class_weights=str(file), stop_after=1, **fixed))
    finetune(FinetuneSettings(class_weights="dark=3", stop_after=1, resume=True, **fixed))
    file.write_text('{"dark": 4}')
    with pytest.raises(PcaeError, match="other values of --class-weights"):
        finetune(FinetuneSettings(class_weights=str(file), resume=True, **fixed))


def test_a_balanced_run_resumes_exactly(photos: Path, tmp_path: Path) -> None:
    def tune(out: str, **changes: Any) -> bytes:
        settings = FinetuneSettings(
            data=str(photos), out=tmp_path / out, balance=True, **RUN | changes
        )
        finetune(settings)
        weights = settings.folder / "checkpoint" / "model.safetensors"
        return weights.read_bytes()

    whole = tune("whole")
    tune("parts", stop_after=1)
    assert tune("parts", resume=True) == whole
