"""Accuracy by class, confusions, and the answers as a table."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import run
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.class_report import ClassReport
from pcae_training.commands import Train
from pcae_training.confusion_image import draw_confusion
from pcae_training.finetune import finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.score import Score

NAMES = ["ant", "bee", "cow", "dog"]


def score(labels: list[int], predicted: list[int]) -> Score:
    values = torch.tensor(labels), torch.tensor(predicted)
    return Score(*values, None, torch.ones(len(labels)))


REPORT = ClassReport.of(score([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 0]), NAMES)


def test_figures_by_class() -> None:
    ant, bee, cow, dog = REPORT.classes
    assert (ant.images, ant.predicted, ant.correct) == (4, 5, 3)
    assert (ant.precision, ant.recall, ant.f1) == (3 / 5, 3 / 4, 2 * 3 / 9)
    assert ant.recall_interval == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson
    assert (bee.precision, bee.recall) == (0.5, 0.5)
    assert (cow.precision, cow.recall, cow.f1) == (None, 0.0, 0.0)
    assert (dog.precision, dog.recall, dog.f1) == (None, None, None)
    assert REPORT.balanced_accuracy == pytest.approx((0.75 + 0.5 + 0) / 3)
    assert REPORT.macro_f1 == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    assert REPORT.confused() == [("ant", "bee", 1), ("bee", "ant", 1), ("cow", "ant", 1)]
    lines = REPORT.lines()
    assert lines[2].split()[0] == "cow"  # the lowest recall first
    assert len(lines) == 6
    assert json.loads(json.dumps(REPORT.to_json()))["confusion"][0] == [3, 1, 0, 0]


def test_of_many_classes_the_worst_are_shown() -> None:
    count = 60
    labels = list(range(count)) * 2
    predicted = [0 if label in (7, 8) else label for label in labels]
    report = ClassReport.of(score(labels, predicted), [f"class {i}" for i in range(count)])
    lines = report.lines()
    assert lines[2].startswith("class 7 ")
    assert "(10 of 60 classes, those of lowest recall)" in lines
    image = Image.open(io.BytesIO(draw_confusion(report, "test")))
    assert image.format == "PNG"
    assert max(image.size) < 3000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, width=8, depth=3, heads=2, classes=2,
                       reduction_points=(0, 1, 2))  # fmt: skip
    preprocess = Preprocess(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    folder = tmp_path / "model"
    checkpoints.save(Checkpoint(VisionTransformer(config), preprocess, ["bright", "dark"]), folder)
    return folder


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_command_writes_what_is_asked_for(
    suffix: str,
    model: Path,
    class_folders: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table, image, figures = (tmp_path / f"out{end}" for end in (suffix, ".png", ".json"))
    flags = ["--data", str(class_folders(6)), "--split", "train", "--budgets", "1.0,0.5"]
    files = ["--predictions", str(table), "--confusion", str(image), "--json", str(figures)]
    assert run(Train, ["evaluate", str(model), *flags, *files]) == 0
    assert "by class, at keep 1:" in capsys.readouterr().out
    read = pyarrow.csv.read_csv if suffix == ".csv" else pyarrow.parquet.read_table
    rows = read(table).to_pylist()
    assert len(rows) == 2 * 12
    assert [row["keep_ratio"] for row in rows] == [1.0] * 12 + [0.5] * 12
    assert rows[0]["image"].endswith("bright/000.png")
    assert [row["row"] for row in rows[:12]] == list(range(12))
    budgets = json.loads(figures.read_text())["budgets"]
    for budget in budgets:
        mine = [row for row in rows if row["keep_ratio"] == budget["keep_ratio"]]
        assert sum(row["correct"] for row in mine) == round(12 * budget["top1"]["value"])
        assert all(row["correct"] == (row["label"] == row["predicted"]) for row in mine)
        counted = budget["by_class"]["classes"]
        assert [each["images"] for each in counted] == [6, 6]
        assert sum(each["correct"] for each in counted) == sum(row["correct"] for row in mine)
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "file", "message"),
    [
        ("--predictions", "out.xlsx", "must end with .parquet or .csv"),
        ("--confusion", "out.jpg", "must end with .png"),
        ("--predictions", "model/config.json/out.csv", "cannot write"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    flag: str,
    file: str,
    message: str,
    model: Path,
    class_folders: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--data", str(class_folders(6)), "--split", "train", flag, str(tmp_path / file)]
    assert run(Train, ["evaluate", str(model), *flags]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_run_leaves_the_figures_of_its_held_out_images(
    class_folders: Any, tmp_path: Path
) -> None:
    settings = FinetuneSettings(
        data=str(class_folders(10)), out=tmp_path / "run", image_size=8, patch_size=2, width=8,
        heads=2, depth=3, batch_size=8, epochs=1, holdout=6, budgets=(1.0, 0.6), crop=0,
        randaugment=0, mixup=0, cutmix=0,
    )  # fmt: skip
    top1: Any = finetune(settings)
    content = json.loads((tmp_path / "run" / "classes.json").read_text())
    for ratio, report in content["by_keep_ratio"].items():
        correct = sum(each["correct"] for each in report["classes"])
        assert correct == top1[float(ratio)].correct
        assert [each["images"] for each in report["classes"]] == [3, 3]
