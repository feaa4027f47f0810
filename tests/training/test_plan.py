from pathlib import Path
from typing import Any

import pytest
import torch

from pcae_serve.errors import PcaeError
from pcae_training.plan import Plan, describe, fit_batch_size
from pcae_training.pretrain import build
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.pretrain_start import new_encoder
from pcae_training.settings import RunSettings
from pcae_training.world import World


def plan(images: int = 50, rank: int = 0, size: int = 1, **changes: Any) -> Plan:
    fixed: dict[str, Any] = {"data": "x", "out": Path("y"), "epochs": 3, "batch_size": 12}
    world = World(torch.device("cpu"), rank, size)
    return Plan(RunSettings(**fixed | changes), world, images)


def test_steps() -> None:
    run = plan()
    assert (run.steps_per_epoch, run.steps, run.last_step) == (4, 12, 12)
    assert plan(stop_after=1).last_step == 4
    assert plan(stop_after=9).last_step == 12


@pytest.mark.parametrize(
    ("size", "accumulate"), [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 3), (3, 2), (6, 1)]
)
def test_processes_share_every_step(size: int, accumulate: int) -> None:
    ranks = [plan(rank=rank, size=size, accumulate=accumulate) for rank in range(size)]
    for step in range(4):
        own = slice(step * accumulate, (step + 1) * accumulate)
        parts = [part for run in ranks for part in run.slices(0)[own]]
        rows = [row for part in parts for row in range(part.start, part.stop)]
        assert rows == list(range(step * 12, step * 12 + 12))
    assert ranks[-1].slices(2) == ranks[-1].slices(0)[2 * accumulate :]


def test_what_does_not_divide() -> None:
    with pytest.raises(PcaeError, match="cannot be divided into 5 processes x 1 micro-batches"):
        plan(size=5)
    with pytest.raises(PcaeError, match="4 micro-batches of an odd number of images"):
        plan(size=2, accumulate=2).check_pairs()
    plan(size=2, accumulate=3).check_pairs()
    with pytest.raises(PcaeError, match="11 images are fewer than one step of --batch-size 12"):
        plan(images=11)


def test_in_words() -> None:
    settings = PretrainSettings(data="x", out=Path("runs/one"), epochs=2, batch_size=256)
    objective = build(settings, new_encoder(settings, settings.preprocess(224)), steps=100)
    run = Plan(settings, World(torch.device("cpu")), 60_000)
    text = "\n".join(describe(run, objective, (1.0, 0.7)))
    assert "196 patches), width 192, depth 12, 3 heads, no classes" in text
    assert "keep 0.7   196 → 137 → 95 → 66 patches, 0.78" in text  # of 1.26
    assert "1.59 times fewer" in text
    assert "2 epochs x 234 steps of 256 images (60,000 images per epoch) = 468 steps" in text
    assert "learning rate 0.00015 after 5% warm-up" in text
    assert "writes     runs/one" in text


@pytest.mark.parametrize(
    ("images", "size", "accumulate", "fitted"),
    [(10_000, 1, 1, 64), (256, 1, 1, 64), (255, 1, 1, 32), (51, 1, 1, 8), (3, 1, 1, 1),
     (51, 3, 1, 12), (51, 2, 2, 8), (9, 4, 1, 8)],
)  # fmt: skip
def test_the_default_batch_size_fits_the_images(
    images: int, size: int, accumulate: int, fitted: int
) -> None:
    settings = RunSettings(data="x", out=Path("y"), accumulate=accumulate)
    world = World(torch.device("cpu"), 0, size)
    note = fit_batch_size(settings, world, images)
    assert (settings.batch_size, note is not None) == (fitted, fitted != 64)
    assert fitted % (size * accumulate) == 0
    given = RunSettings(data="x", out=Path("y"), batch_size=64)
    assert fit_batch_size(given, world, images) is None
    assert given.batch_size == 64
