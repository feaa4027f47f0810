"""Teachers: checkpoints and ONNX graphs that another model learns from."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.sample_rng import SampleRng
from pcae_training.teacher import Teachers, load_teachers

CPU = torch.device("cpu")
OURS = Preprocess(8, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
THEIRS = Preprocess(8, 8, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
LABELS = ["bright", "dark"]


def vit(classes: int = 2, size: int = 8) -> VisionTransformer:
    torch.manual_seed(3)
    model = VisionTransformer(
        ViTConfig(image_size=size, patch_size=2, width=8, depth=11, heads=2, classes=classes)
    )
    nn.init.normal_(model.get_parameter("head.weight"))
    return model.eval()


def checkpoint(folder: Path, labels: list[str] = LABELS, **changes: Any) -> Path:
    size = changes.get("size", 8)
    preprocess = replace(THEIRS, image_size=size, resize=size)
    model = vit(len(labels), **changes)
    checkpoints.save(Checkpoint(model, preprocess, labels), folder)
    return folder


def images(count: int = 4) -> Tensor:
    """Images normalised as for the model that learns."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 4 - 2


def in_their_values(images: Tensor) -> Tensor:
    return (images * 0.25 + 0.5 - 0.4) / 0.2


def load(*paths: Path, classes: list[str] = LABELS) -> Teachers:
    learner = Checkpoint(vit(len(classes)), OURS, classes)
    teachers = load_teachers([str(path) for path in paths], learner, CPU)
    assert teachers is not None
    return teachers


def test_a_checkpoint_sees_the_same_pixels_in_its_own_normalisation(tmp_path: Path) -> None:
    given = load(checkpoint(tmp_path / "t"))(images())
    expected = vit()(in_their_values(images())).softmax(1)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)
    assert not given.requires_grad


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "t", ["dark", "grey", "bright"])
    logits = vit(3)(in_their_values(images()))[:, [2, 0]]
    torch.testing.assert_close(load(path)(images()), logits.softmax(1), atol=1e-5, rtol=1e-4)


class Graph(nn.Module):
    """Logits from the mean of each third of the channels, in some layout."""

    def __init__(self, channels_last: bool, probabilities: bool = False) -> None:
        super().__init__()
        self.channels_last, self.probabilities = channels_last, probabilities

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, 2]."""
        means = pixels.float().mean(dim=(1, 2) if self.channels_last else (2, 3))
        logits = means[:, :2] / 100
        return logits.softmax(1) if self.probabilities else logits


def export(path: Path, example: Tensor, *, fixed: bool = False, **kind: Any) -> Path:
    shapes = None if fixed else ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own calls
        program = torch.onnx.export(
            Graph(**kind).eval(), (example,), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    program.save(str(path))
    return path


#: Between them, the two cells of the fast suite have each value of each argument.
FAST_LAYOUTS = [(True, torch.uint8, False), (False, torch.float32, True)]


@pytest.mark.parametrize(
    ("channels_last", "dtype", "probabilities"),
    [
        pytest.param(*cell, marks=[] if cell in FAST_LAYOUTS else pytest.mark.slow)
        for cell in itertools.product((False, True), (torch.uint8, torch.float32), (False, True))
    ],
)
def test_a_graph_of_any_layout(
    channels_last: bool, dtype: torch.dtype, probabilities: bool, tmp_path: Path
) -> None:
    shape = (2, 8, 8, 3) if channels_last else (2, 3, 8, 8)
    path = export(
        tmp_path / "t.onnx",
        torch.zeros(shape, dtype=dtype),
        channels_last=channels_last,
        probabilities=probabilities,
    )
    values = images()
    seen = values
    if dtype == torch.uint8:
        seen = ((values * 0.25 + 0.5) * 255).round().clamp(0, 255)
    expected = (seen.mean(dim=(2, 3))[:, :2] / 100).softmax(1)
    torch.testing.assert_close(load(path)(values), expected, atol=1e-5, rtol=1e-4)


def test_the_mean_of_several(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one")
    two = export(tmp_path / "two.onnx", torch.zeros(2, 3, 8, 8), channels_last=False)
    both = (load(one)(images()) + load(two)(images())) / 2
    torch.testing.assert_close(load(one, two)(images()), both)
    assert load_teachers((), Checkpoint(vit(), OURS, LABELS), CPU) is None


def test_a_student_learns_labels_and_teacher(tmp_path: Path) -> None:
    """Cross-entropy is linear in the target."""
    teachers = load(checkpoint(tmp_path / "t"))
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])

    def loss(share: float, teachers: Teachers | None) -> float:
        settings = FinetuneSettings(
            data="x", out=Path("y"), image_size=8, patch_size=2, width=8, heads=2, keep=1.0,
            crop=0, flip=False, randaugment=0, erase=0, mixup=0, cutmix=0, drop_path=0,
            teacher_share=share,
        )  # fmt: skip
        start = Checkpoint(vit(), OURS, LABELS)
        objective = Finetuning(start, settings, None, teachers)  # type: ignore[arg-type]
        value: float = objective(pixels, labels, SampleRng(0, 0, 4), 1.0).item()
        return value

    alone, taught = loss(0.5, None), loss(1.0, teachers)
    assert loss(0.0, teachers) == pytest.approx(alone)
    assert loss(0.25, teachers) == pytest.approx(0.75 * alone + 0.25 * taught, rel=1e-5)


def test_teachers_are_no_part_of_the_run(class_folders: Any, tmp_path: Path) -> None:
    """They are neither trained nor saved, and the run resumes exactly."""
    teacher = checkpoint(tmp_path / "t")
    before = (teacher / "model.safetensors").read_bytes()

    def run(name: str, **changes: Any) -> FinetuneSettings:
        fixed: dict[str, Any] = {
            "image_size": 8, "patch_size": 2, "width": 8, "heads": 2, "depth": 11, "epochs": 2,
            "batch_size": 8, "holdout": 4, "budgets": (1.0, 0.6), "sampling": "one",
            "weight_ema": 0.9, "distil_from": "average", "ramp_length": 0,
        }  # fmt: skip
        return FinetuneSettings(
            data=data, out=tmp_path / name, teacher=f"{teacher}", **fixed | changes
        )

    data = str(class_folders(10))
    whole, parts = run("whole"), run("parts")
    finetune(whole)
    finetune(parts.model_copy(update={"stop_after": 1}))
    finetune(parts.model_copy(update={"resume": True}))
    one, two = (checkpoints.load_state(out) for out in (whole.folder, parts.folder))
    assert one is not None
    assert two is not None
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.startswith("objective/model.") for name in one)  # raw beside the average
    assert not any("teacher" in name for name in one)
    assert (teacher / "model.safetensors").read_bytes() == before


def test_what_cannot_teach(tmp_path: Path) -> None:
    cases: list[tuple[Path, str]] = [
        (tmp_path / "none.onnx", "there is no such file"),
        (tmp_path / "none", "does not exist"),
        (checkpoint(tmp_path / "other", ["bright", "cat"]), "it lacks 'dark' (it has 2, the"),
        (checkpoint(tmp_path / "large", size=12), "takes images of 12 pixels, and the model of 8"),
        (
            export(tmp_path / "size.onnx", torch.zeros(2, 3, 9, 9), channels_last=False),
            "takes images of 9 x 9 pixels",
        ),
        (
            export(tmp_path / "one.onnx", torch.zeros(1, 3, 8, 8), channels_last=False, fixed=True),
            "takes 1 image at a time",
        ),
    ]
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no graph")
    cases.append((damaged, "does not load"))
    for path, message in cases:
        with pytest.raises(PcaeError) as caught:
            load(path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    three = export(tmp_path / "ok.onnx", torch.zeros(2, 3, 8, 8), channels_last=False)
    with pytest.raises(PcaeError, match="gives 2 numbers an image, and the images have 3 classes"):
        load(three, classes=["a", "b", "c"])
    features = tmp_path / "features"
    headless = VisionTransformer(replace(vit().config, classes=0))
    checkpoints.save(Checkpoint(headless, THEIRS, []), features)
    with pytest.raises(PcaeError, match="gives features; a teacher of this model needs classes"):
        load(features)
    assert np.isfinite(load(checkpoint(tmp_path / "fine"))(images()).numpy()).all()
