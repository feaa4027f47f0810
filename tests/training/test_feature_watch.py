"""When features are measured, what is recorded, and when a warning is printed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.feature_figures import effective_rank, knn_accuracy
from pcae_training.feature_watch import COST_SHARE, FeatureWatch, WatchTimes, describe
from pcae_training.journal import Journal
from pcae_training.watch_settings import Sample

PIXELS = torch.randint(
    0, 256, (70, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.arange(70) % 3


class Encoder:
    """Features of `directions` dimensions; the targets are twice as large."""

    directions = 12

    def views(self, images: Tensor) -> Mapping[str, Tensor]:
        tokens = images.flatten(1)[:, None, :12].repeat(1, 5, 1)  # 5 patches
        tokens[..., self.directions :] = 1.0
        return {"features": tokens, "targets": 2 * tokens}


class Broken(Encoder):
    def views(self, images: Tensor) -> Mapping[str, Tensor]:
        return {"features": torch.full((len(images), 5, 12), math.nan)}


def watch(
    encoder: Any,
    labels: Tensor | None = LABELS,
    first_warning: int = 0,
    untrained: Any = None,
) -> FeatureWatch:
    half = (0.5, 0.5, 0.5)
    return FeatureWatch(
        encoder,
        Sample(PIXELS, labels),
        Preprocess(4, 4, half, half),
        torch.device("cpu"),
        WatchTimes(steps_per_epoch=10, epochs=4, cost=0.1),
        first_warning=first_warning,
        advice="try something else",
        untrained=untrained,
    )


def journal(folder: Path) -> Journal:
    return Journal(folder, {}, step=0, images=0, total=100)


def due(**run: Any) -> list[int]:
    times = WatchTimes(**run)
    return [s for s in range(1, run["steps_per_epoch"] * run["epochs"] + 1) if times.due(s)]


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        # one epoch: eight times if that is cheap, otherwise as often as it is
        ({"steps_per_epoch": 1000, "epochs": 1, "cost": 0.1}, list(range(125, 1001, 125))),
        ({"steps_per_epoch": 240, "epochs": 1, "cost": 4.0}, [80, 160, 240]),
        # a long run: after each epoch
        ({"steps_per_epoch": 100, "epochs": 9, "cost": 1.0}, list(range(100, 901, 100))),
        # few images: the cost of one measurement is that of 10 steps of 40
        ({"steps_per_epoch": 40, "epochs": 12, "cost": 10.0}, [200, 400, 480]),
        ({"steps_per_epoch": 3, "epochs": 1, "cost": 0.001}, [1, 2, 3]),
    ],
)
def test_when_features_are_measured(run: Any, steps: list[int]) -> None:
    assert due(**run) == steps
    all_but_last = len(steps) - 1
    assert all_but_last * run["cost"] <= COST_SHARE * run["steps_per_epoch"] * run["epochs"]


def test_figures_of_the_sample() -> None:
    figures = watch(Encoder()).measure()
    features = ((PIXELS.float() / 255 - 0.5) / 0.5).flatten(1)[:, :12]
    assert figures["features/rank"] == pytest.approx(effective_rank(features), rel=1e-6)
    assert figures["targets/rank"] == pytest.approx(figures["features/rank"], rel=1e-6)
    deviation = float(features.double().std(dim=0, correction=0).mean())
    assert figures["features/deviation"] == pytest.approx(deviation)
    assert figures["targets/deviation"] == pytest.approx(2 * deviation)
    assert figures["features/knn"] == knn_accuracy(features, LABELS)
    assert "targets/knn" not in figures
    assert "features/knn" not in watch(Encoder(), labels=None).measure()


def test_each_figure_is_reported_next_to_that_of_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder()
    watched = watch(encoder)
    with journal(tmp_path) as log:
        watched.begin(0, log)
        encoder.directions = 11
        watched.report(20, log)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], first["epoch"]) == (0, 0)
    assert (second["step"], second["epoch"]) == (20, 2)
    names = {name for name in first if "/" in name}
    assert names == {
        "features/rank", "features/deviation", "features/knn", "targets/rank", "targets/deviation",
    }  # fmt: skip
    for name in names:
        assert second[f"{name}_start"] == first[name]
    assert second["features/rank"] < first["features/rank"]
    now = {name: second[name] for name in names}
    assert watched.record["reports"] == [{"step": 20} | now]
    line = next(each for each in capsys.readouterr().err.splitlines() if "step 20" in each)
    assert f"{second['features/rank']:.2f} ({first['features/rank']:.2f} at the start)" in line


def test_one_warning_after_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder()
    watched = watch(encoder, first_warning=10)
    with journal(tmp_path) as log:
        watched.begin(0, log)
        encoder.directions = 2
        watched.report(5, log)
        assert "warning" not in capsys.readouterr().err
        watched.report(10, log)
        (line,) = (each for each in capsys.readouterr().err.splitlines() if "warning" in each)
        assert "try something else" in line
        watched.report(20, log)
        assert "warning" not in capsys.readouterr().err
    assert watched.record["warned"] == 10


def test_little_change_and_gains_do_not_warn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder()
    encoder.directions = 8
    watched = watch(encoder)
    with journal(tmp_path) as log:
        watched.begin(0, log)
        watched.record["untrained_rank"] *= 1.04
        watched.report(5, log)
        encoder.directions = 12
        watched.report(10, log)
    assert "warning" not in capsys.readouterr().err


def test_the_bound_is_an_untrained_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that starts from trained weights may fall below its start."""
    encoder, untrained = Encoder(), Encoder()
    untrained.directions = 4
    watched = watch(encoder, untrained=untrained)
    with journal(tmp_path) as log:
        watched.begin(0, log)
        assert 3 < watched.record["untrained_rank"] < 5
        assert watched.record["start"]["features/rank"] > 8
        encoder.directions = 6
        watched.report(5, log)
        assert "warning" not in capsys.readouterr().err
        encoder.directions = 3
        watched.report(10, log)
    untrained_rank = watched.record["untrained_rank"]
    assert f"{untrained_rank:.2f} of an untrained encoder" in capsys.readouterr().err


def test_a_run_without_figures_of_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier version began it: there is nothing to compare with."""
    watched = watch(Encoder())
    with journal(tmp_path) as log:
        watched.begin(20, log)
        watched.report(30, log)
    assert watched.record["start"] == {}
    printed = capsys.readouterr().err
    assert "effective rank" in printed
    assert "start" not in printed


def test_features_that_are_not_finite_are_left_to_the_trainer(tmp_path: Path) -> None:
    watched = watch(Broken())
    with journal(tmp_path) as log:
        watched.report(5, log)
    assert watched.record["reports"] == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_text() -> None:
    text = describe({"features/rank": 1.5, "features/knn": 0.382}, {"features/rank": 2.3})
    assert text == "features: effective rank 1.50 (2.30 at the start), 5-NN 38.2%"
