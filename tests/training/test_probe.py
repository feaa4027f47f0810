"""What a frozen model's features hold, by keep ratio."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.commands import Train
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.probe import ProbeSettings, run_probe

PREPROCESS = Preprocess(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random model with a head for other classes, which a probe does not read."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, width=8, depth=3, heads=2, classes=5,
                       reduction_points=(0, 1, 2))  # fmt: skip
    folder = tmp_path / "model"
    labels = [f"class {i}" for i in range(5)]
    checkpoints.save(Checkpoint(VisionTransformer(config), PREPROCESS, labels), folder)
    return folder


def test_the_installed_command(
    model: Path, class_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "probe.json"
    flags = ["--data", str(class_folders(20)), "--budgets", "1.0,0.5", "--json", str(file)]
    assert run(Train, ["probe", str(model), *flags, "--holdout", "0.25"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "10 held-out images of images/train, readouts of 30"
    assert lines[1].split()[:2] == ["keep", "GMACs"]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "0.5", "pixels"]
    assert "--freeze" in lines[5]
    assert "held out: 10 of 40 images" in printed.err
    content = json.loads(file.read_text())
    assert content["n"] == 10
    assert content["trained_on"] == 30
    assert content["baseline_pixels"]["ridge"]["value"] == 1.0  # bright and dark
    assert [budget["keep_ratio"] for budget in content["budgets"]] == [1.0, 0.5]
    for budget in content["budgets"]:
        assert set(budget["top1"]) == {"knn", "ridge", "logistic"}
        assert budget["top1"]["logistic"]["value"] > 0.8
    assert content["budgets"][0]["top1_difference"]["knn"]["value"] == 0


def test_features_are_what_the_head_would_read(model: Path, class_folders: Any) -> None:
    """Measured on the images that the readouts were trained on, so that nearest is itself."""
    data = str(class_folders(10))
    settings = ProbeSettings(
        checkpoint=model, data=data, eval_data=data, eval_split="train", budgets=(1.0,),
        methods=("knn",), neighbours=1,
    )  # fmt: skip
    probe = run_probe(settings)
    assert probe.n == 20
    assert probe.scores[1.0]["knn"].top1.value == 1.0


def test_bad_input_is_one_line(
    model: Path, class_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(class_folders(6))]
    for flags, code, message in (
        ([str(model), *data, "--methods", "svm"], 2, "--methods"),
        ([str(model), *data, "--json", str(tmp_path)], 1, "cannot write"),
        ([str(model), *data, "--budgets", "0.01"], 1, "leaves no patch"),
        ([str(tmp_path / "none"), *data], 1, "does not exist"),
    ):
        assert run(Train, ["probe", *flags]) == code
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("pcae-train: ")
        assert message in error


def test_a_checkpoint_without_preprocessing(tmp_path: Path, class_folders: Any) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, width=192, depth=1, heads=3, classes=0,
                       pooling="cls", reduction_points=())  # fmt: skip
    file = tmp_path / "vit.safetensors"
    save_file(VisionTransformer(config).state_dict(), file)
    settings = ProbeSettings(checkpoint=file, data=str(class_folders(6)))
    with pytest.raises(PcaeError, match="does not specify how images are preprocessed"):
        run_probe(settings)
