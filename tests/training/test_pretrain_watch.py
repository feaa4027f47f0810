"""Pretraining with the watch: a run made to collapse warns, a healthy one does not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.pretrain import pretrain
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.trainer import Trainer

HEALTHY: dict[str, Any] = {"ema": 0.9995, "lr": 4e-4, "warmup": 0.3}
COLLAPSING: dict[str, Any] = {"ema": 0.5, "lr": 0.05}  # a fast teacher, and much too large steps


@pytest.fixture
def images(tmp_path: Path) -> str:
    """40 images of nine coloured squares each, in two classes; the same ones as validation."""
    rng = np.random.default_rng(0)
    for i in range(40):
        squares = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for split in ("train", "validation"):
            folder = tmp_path / "images" / split / f"class {i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(squares).save(folder / f"{i:03}.png")
    return str(tmp_path / "images")


def run(images: str, out: Path, **changes: Any) -> PretrainSettings:
    fixed: dict[str, Any] = {
        "data": images, "out": out, "image_size": 24, "patch_size": 4, "width": 16, "depth": 9,
        "heads": 2, "batch_size": 10, "crop": 0, "flip": False, "epochs": 6, "log_every": 1,
    }  # fmt: skip
    return PretrainSettings(**fixed | changes)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = checkpoints.load(out).training["watch"]
    return found


def rank(views: Tensor) -> float:
    """Eigenvalues of the covariance of the means over the patches."""
    eigenvalues = np.linalg.eigvalsh(np.cov(views.mean(dim=1).double().numpy().T)).clip(1e-15)
    shares = eigenvalues / eigenvalues.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_a_run_made_to_collapse_warns_once(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(run(images, tmp_path / "out", **COLLAPSING))
    (warning,) = (w for w in capsys.readouterr().err.splitlines() if w.startswith("warning"))
    assert "--ema 0.9995 --lr 4e-4 --warmup 0.3 --batch-size 128" in warning
    assert "now --lr 0.05 --warmup 0.05 --ema 0.5 --batch-size 10" in warning
    assert record(tmp_path / "out")["warned"] is not None


def test_a_healthy_run_does_not(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(run(images, tmp_path / "out", **HEALTHY))
    printed = capsys.readouterr().err
    assert "effective rank" in printed
    assert "warning" not in printed
    assert record(tmp_path / "out")["warned"] is None


def test_figures_of_the_last_checkpoint(images: str, tmp_path: Path) -> None:
    """Against the saved encoder, all images at once; the sample is all 40 in another order."""
    out = tmp_path / "out"
    pretrain(run(images, out, method="mae", epochs=1, lr=2e-3))
    saved = checkpoints.load(out)
    files = sorted(Path(images, "train").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files])
    with torch.no_grad():
        x = saved.model.embed((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        for block in saved.model.blocks:
            x = block(x)
        tokens = saved.model.norm(x[:, 1:])
    last = record(out)["reports"][-1]
    assert last["features/rank"] == pytest.approx(rank(tokens), rel=1e-4)
    deviation = float(tokens.std(dim=0, correction=0).mean())
    assert last["features/deviation"] == pytest.approx(deviation, rel=1e-4)
    assert not [name for name in last if name.startswith("targets")]  # mae: pixels


def test_labelled_images_add_a_knn_accuracy(images: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pretrain(run(images, out, epochs=1, eval_data=images, watch_images=30))
    start, *_, last = (line for line in metrics(out) if "features/rank" in line)
    assert start["step"] == 0
    assert 0 <= last["features/knn"] <= 1
    assert (last["features/knn"] * 30) % 1 == pytest.approx(0, abs=1e-9)
    assert last["features/knn_start"] == start["features/knn"]
    for figure in ("rank", "deviation"):
        assert last[f"targets/{figure}"] != last[f"targets/{figure}_start"]


def test_a_run_from_other_weights_is_compared_with_an_untrained_encoder(
    images: str, tmp_path: Path
) -> None:
    pretrain(run(images, tmp_path / "one", **HEALTHY, epochs=1))
    more = run(images, tmp_path / "two", epochs=1).model_dump(exclude_unset=True)
    for size in ("width", "depth", "heads"):
        del more[size]  # those of --init
    pretrain(PretrainSettings(**more, init=str(tmp_path / "one")))
    first, second = record(tmp_path / "one"), record(tmp_path / "two")
    assert first["untrained_rank"] == first["start"]["features/rank"]
    assert second["untrained_rank"] == pytest.approx(first["untrained_rank"])  # the same seed
    last = first["reports"][-1]["features/rank"]
    assert second["start"]["features/rank"] == pytest.approx(last, rel=1e-5)


def test_the_watch_changes_no_weight(images: str, tmp_path: Path) -> None:
    runs = [
        run(images, tmp_path / f"out-{watched}", epochs=1, watch_images=watched)
        for watched in (0, 40)
    ]
    for each in runs:
        pretrain(each)
    one, other = (checkpoints.load(each.folder) for each in runs)
    assert "watch" not in one.training
    weights = other.model.state_dict()
    assert all(torch.equal(weights[n], w) for n, w in one.model.state_dict().items())


def test_a_resumed_run_has_the_figures_of_the_unbroken_one(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing gets to save."""

    def run_to_step_18(self: Trainer, *arguments: Any) -> None:
        if self.step == 18:
            raise Killed
        step(self, *arguments)

    step = Trainer._step
    pretrain(run(images, tmp_path / "whole", **COLLAPSING, watch_images=5))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", run_to_step_18)
        with pytest.raises(Killed):
            pretrain(run(images, tmp_path / "broken", **COLLAPSING, watch_images=5))
    pretrain(run(images, tmp_path / "broken", **COLLAPSING, watch_images=5, resume=True))
    whole, broken = (record(tmp_path / name) for name in ("whole", "broken"))
    assert [report["step"] for report in whole["reports"]] == [16, 24]  # on both sides
    assert whole == broken
    trails = [
        [line for line in metrics(tmp_path / name) if "features/rank" in line]
        for name in ("whole", "broken")
    ]
    assert trails[0] == trails[1]
    one, other = (checkpoints.load_state(tmp_path / name) for name in ("whole", "broken"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_eval_data_that_cannot_be_read(images: str, tmp_path: Path) -> None:
    with pytest.raises(PcaeError, match="nowhere"):
        pretrain(run(images, tmp_path / "out", eval_data=str(tmp_path / "nowhere")))
    assert not (tmp_path / "out").exists()
