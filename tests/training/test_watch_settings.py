"""The images on which features are measured: the same ones in every start of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest
import torch

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training.columns import DataChoice
from pcae_training.data import load
from pcae_training.watch_settings import WatchSettings, draw_labelled, draw_training

PREPROCESS = Preprocess(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CPU = torch.device("cpu")


def test_training_images_are_cut_from_the_centre(class_folders: Any) -> None:
    larger = replace(PREPROCESS, image_size=12, resize=12)
    images = load(str(class_folders(50, size=12)), "train", larger, labelled=False)
    sample = draw_training(images, 70, 8, 0, CPU, 0)
    assert sample.pixels.shape == (70, 3, 8, 8)
    assert sample.labels is None
    whole = {images[i][0][:, 2:10, 2:10].numpy().tobytes() for i in range(100)}
    drawn = [image.numpy().tobytes() for image in sample.pixels]
    assert set(drawn) <= whole
    assert len(set(drawn)) == 70
    assert torch.equal(sample.pixels, draw_training(images, 70, 8, 0, CPU, 0).pixels)
    assert not torch.equal(sample.pixels, draw_training(images, 70, 8, 1, CPU, 0).pixels)
    assert len(draw_training(images, 512, 8, 0, CPU, 0).pixels) == 100


def test_labelled_images_keep_their_labels(class_folders: Any) -> None:
    root = str(class_folders(50, split="validation"))
    settings = WatchSettings(eval_data=root, watch_images=70)
    sample = draw_labelled(settings, PREPROCESS, 0, DataChoice(), 0.01)
    assert sample.labels is not None
    bright = sample.pixels.float().mean(dim=(1, 2, 3)) > 110
    assert torch.equal(sample.labels == 0, bright)  # class 0 is `bright`
    assert len(sample.labels) == 70
    again = draw_labelled(settings, PREPROCESS, 0, DataChoice(), 0.01)
    assert torch.equal(sample.pixels, again.pixels)


def test_lists_of_labels_are_refused(class_folders: Any, tmp_path: Path) -> None:
    files = sorted(class_folders(2).rglob("*.png"))
    rows = {"image": [f.read_bytes() for f in files], "labels": [[0], [0, 1], [], [1]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    settings = WatchSettings(eval_data=str(tmp_path / "rows.parquet"))
    with pytest.raises(PcaeError, match="--eval-data needs one class an image"):
        draw_labelled(settings, PREPROCESS, 0, DataChoice(), 0.01)
