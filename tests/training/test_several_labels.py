"""Training, evaluation and use of a model whose labels are independent."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.nn import functional as F

from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.augment import Mixing
from pcae_training.commands import Train
from pcae_training.evaluate import EvaluateSettings, run_evaluation
from pcae_training.finetune import finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare
from pcae_training.probe import ProbeSettings, run_probe
from pcae_training.sample_rng import SampleRng
from pcae_training.task import choose_task
from pcae_training.teacher import load_teachers

SIZES: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "width": 8, "heads": 2, "depth": 11,
}  # fmt: skip
RUN: dict[str, Any] = {
    "batch_size": 8, "holdout": 12, "lr": 1e-2, "crop": 0, "randaugment": 0, "budgets": "1.0,0.6",
}  # fmt: skip


def write(folder: Path, rows: int = 48, **changes: Any) -> Path:
    """Noise with a bright upper half (`top`), a bright lower half (`low`), both or neither."""
    rng, images, labels = np.random.default_rng(0), [], []
    for i in range(rows):
        pixels = rng.integers(0, 80, (8, 8, 3))
        own = [name for bit, name in enumerate(("top", "low")) if i >> bit & 1]
        pixels[:4] += 160 * ("top" in own)
        pixels[4:] += 160 * ("low" in own)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": f"{i}.png"})
        labels.append(own)
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        table = pa.table({"image": images, "labels": changes.get("labels", labels)})
        parquet.write_table(table, folder / f"{split}-0.parquet")
    return folder


@pytest.fixture
def tune(tmp_path: Path) -> Any:
    data = str(write(tmp_path / "data"))

    def make(out: str, **changes: Any) -> FinetuneSettings:
        sizes = {} if "init" in changes else SIZES
        given = {"data": data, "out": tmp_path / out} | sizes | RUN | {"epochs": 1} | changes
        return FinetuneSettings(**given)

    return make


def test_both_labels_are_learnt(tune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """From the same images a model of one class could not answer both, or neither."""
    settings = tune("run", epochs=24, select="best", mixup=0, cutmix=0)
    found: Any = finetune(settings)
    assert found[1.0].value > 0.95
    assert "each with a list of labels" in capsys.readouterr().err
    trained = checkpoints.load(settings.folder)
    assert trained.answers == "labels"
    assert trained.training["final"]["1.0"] == {"map": found[1.0].value, "n": 12}
    assert "holdout_map" in trained.training["history"][0]
    classes = json.loads((settings.folder / "classes.json").read_text())
    assert [each["class"] for each in classes["by_keep_ratio"]["1.0"]["labels"]] == ["low", "top"]


def test_the_hold_out_has_each_combination(tune: Any) -> None:
    start = prepare(tune("run"), report=False)
    assert int(start.holdout.labels[:, 0].sum()) == 6
    assert int((~start.holdout.labels.any(dim=1)).sum()) == 3


def test_one_steps_loss_is_binary_cross_entropy_of_mixed_sets(tune: Any) -> None:
    labels = torch.tensor([[True, False], [True, True]])
    images, draws = torch.zeros(2, 3, 4, 4), SampleRng(0, 0, 2)
    _, targets = Mixing(smoothing=0.2)(images, labels, 2, draws)
    torch.testing.assert_close(targets, torch.tensor([[0.9, 0.1], [0.9, 0.9]]))
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    expected = F.binary_cross_entropy(logits.sigmoid(), targets)
    torch.testing.assert_close(choose_task(True).loss(logits, targets), expected)


def test_the_commands(tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    chosen = SIZES | RUN | {"epochs": 1}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    assert run(Train, ["finetune", "--data", data, "--out", out, *flags]) == 0
    printed = capsys.readouterr()
    assert f"wrote {out}; mean average precision on held-out images:" in printed.out
    assert printed.out.rstrip().endswith("--agreement")
    answers, figures = tmp_path / "answers.parquet", tmp_path / "figures.json"
    common = ["evaluate", out, "--data", data, "--budgets", "1.0,0.6"]
    assert run(Train, [*common, "--predictions", str(answers), "--json", str(figures)]) == 0
    printed = capsys.readouterr()
    assert "mAP % [95 %]" in printed.out
    assert "mAP minus keep 1 [95 %]" in printed.out
    table = parquet.read_table(answers).to_pylist()
    assert len(table) == 2 * 48
    assert table[3]["labels"] == ["low", "top"]
    assert set(table[3]["probabilities"]) == {"low", "top"}
    content = json.loads(figures.read_text())["budgets"][0]
    assert 0 <= content["map"]["value"] <= 1
    assert "by_class" in content
    csv = tmp_path / "answers.csv"
    assert run(Train, [*common, "--predictions", str(csv)]) == 0
    assert '"[""low"", ""top""]"' in csv.read_text()


def test_a_teacher_of_independent_labels(tune: Any, tmp_path: Path) -> None:
    finetune(tune("teacher"))
    learner = checkpoints.load(tmp_path / "teacher")
    teachers = load_teachers([str(tmp_path / "teacher")], learner, torch.device("cpu"))
    assert teachers is not None
    images = torch.rand(3, 3, 8, 8)
    expected = learner.model(images).sigmoid()  # they do not sum to one
    torch.testing.assert_close(teachers(images), expected, rtol=1e-4, atol=1e-5)
    found: Any = finetune(tune("student", teacher=[tmp_path / "teacher"]))
    assert found[1.0].n == 12


def refuses(call: Any) -> str:
    with pytest.raises(PcaeError) as caught:
        call()
    return str(caught.value)


def test_one_class_and_several_labels_do_not_mix(
    tune: Any, class_folders: Any, tmp_path: Path
) -> None:
    photos = str(class_folders(12))
    finetune(tune("several"))
    finetune(tune("one", data=photos, holdout=4))
    several, one = tmp_path / "several", tmp_path / "one"

    def evaluate(model: Path, data: str) -> str:
        settings = EvaluateSettings(checkpoint=model, data=data, split="train")
        return refuses(lambda: run_evaluation(settings))

    data = str(tmp_path / "data")
    assert evaluate(one, data).startswith("the checkpoint gives one class an image, and")
    message = evaluate(several, photos)
    assert message.endswith("any number of labels an image, and images/train has one class")
    both = tune("x", eval_data=photos, eval_split="train", holdout=None)
    assert "--data has lists of labels, and --eval-data has one" in refuses(lambda: finetune(both))
    message = refuses(lambda: finetune(tune("y", teacher=[one])))
    assert "gives classes; a teacher of this model needs labels" in message
    message = refuses(lambda: finetune(tune("z", teacher=[tmp_path / "t.onnx"])))
    assert "must be a checkpoint of independent labels" in message


def test_a_head_of_classes_is_not_taken_for_labels(
    tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Softmax logits are no logits of independent labels, even under the same names."""
    first = tune("first")
    finetune(first)
    config = first.folder / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace("multi_label", "single_label"))
    capsys.readouterr()
    finetune(tune("second", init=first.folder))
    assert "newly initialised: head.weight, head.bias" in capsys.readouterr().err


def test_streams_probes_and_pictures_of_confusion_are_refused(tune: Any, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    stream = tune("s", stream=True, epoch_size=48, eval_data=data, eval_split="test", holdout=None)
    assert "lists of labels, which --stream does not read" in refuses(lambda: finetune(stream))
    finetune(tune("run"))
    probe = ProbeSettings(checkpoint=tmp_path / "run", data=data)
    assert "probe needs one class an image" in refuses(lambda: run_probe(probe))
    drawn = EvaluateSettings(
        checkpoint=tmp_path / "run", data=data, confusion=tmp_path / "confusion.png"
    )
    assert "which --confusion cannot draw" in refuses(lambda: run_evaluation(drawn))
