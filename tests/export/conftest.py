"""A tiny checkpoint, PNG files in class folders, and one bundle made of them by the command.

Tracing takes seconds, and what is traced has no weights in it: each network is traced once a run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from pcae_export import graph
from pcae_export.commands import Export
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.command import run
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.model import VisionTransformer, ViTConfig
from tests.support.exporting import PREPROCESS

LABELS = ["bag", "coat", "shoe"]
TIERS = {"low": 0.4, "mid": 0.6, "full": 1.0}


def make_tiny(**changes: object) -> Checkpoint:
    """64 patches, reduced after three of four blocks; weights drawn by one seed."""
    sizes: dict[str, object] = {
        "image_size": 16, "patch_size": 2, "width": 32, "depth": 4, "heads": 2,
        "classes": len(LABELS), "reduction_points": (0, 1, 2),
    }  # fmt: skip
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**(sizes | changes)))  # type: ignore[arg-type]
    training = {
        "settings": {"data": "/secret/place/toys", "out": "/secret/out", "epochs": 2, "lr": 0.1},
        "epochs_done": 2,
        "history": [{"epoch": 2, "train_loss": 0.5, "train_s": 60, "holdout_top1": {"1.0": 0.75}}],
        "versions": {"torch": "2.13.0"},
    }
    return Checkpoint(model.eval(), PREPROCESS, LABELS, training)


@dataclass(frozen=True)
class Made:
    """What the fixture's command was given and made."""

    checkpoint: Path
    data: Path
    bundle: Bundle


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data sets go to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="session", autouse=True)
def _traced_once() -> Iterator[None]:
    """`graph.trace` remembers by all that it depends on: sizes and rule, mean and std."""
    known: dict[object, ir.Model] = {}
    trace = graph.trace

    def remembered(
        model: VisionTransformer, preprocess: Preprocess, dense: bool = False
    ) -> ir.Model:
        key = (model.config, preprocess.mean, preprocess.std, dense)
        if key not in known:
            known[key] = trace(model, preprocess, dense)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "trace", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Checkpoint]:
    """Makes the tiny checkpoint, with changes to its ViTConfig."""
    return make_tiny


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    return make_images


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 PNG files of 18 x 16 pixels: <folder>/test/<label>/<number>.png."""
    return make_images(tmp_path_factory.mktemp("toys"), LABELS)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Made:
    folder = tmp_path_factory.mktemp("made")
    checkpoints.save(make_tiny(), folder / "checkpoint")
    flags = [flag for name, ratio in TIERS.items() for flag in ("--tier", f"{name}={ratio}")]
    argv = ["bundle", str(folder / "checkpoint"), str(folder / "toys"), "--eval-data", str(data)]
    assert run(Export, [*argv, *flags, "--card-note", "Toys, not for use."]) == 0
    return Made(folder / "checkpoint", data, load_bundle(folder / "toys"))


def make_images(root: Path, labels: list[str], each: int = 24) -> Path:
    draw = np.random.default_rng(0)
    for label in labels:
        (root / "test" / label).mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (16, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / label / f"{number}.png")
    return root
