"""Tiny labelled images as people keep them, slow scores, and caches that end with the test."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

MakeFolders = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # of commands
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture
def class_folders(tmp_path: Path) -> MakeFolders:
    """Write ROOT/SPLIT/{bright,dark}/N.png, noise whose level is its class; returns ROOT."""

    def make(per_class: int = 12, size: int = 8, split: str = "train") -> Path:
        rng = np.random.default_rng(0)
        for name, level in (("bright", 170), ("dark", 50)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                noise = rng.integers(level - 40, level + 40, (size, size, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i:03}.png")
        return tmp_path / "images"

    return make


@dataclass(frozen=True)
class SlowScore:
    """What a score is compared with: an image at a time, a bin at a time."""

    top1: list[bool]
    top5: list[bool]
    confidence: list[float]

    @property
    def calibration_error(self) -> float:
        """Guo et al. 2017, equation 3."""
        error = 0.0
        for m in range(15):
            inside = [i for i, c in enumerate(self.confidence) if m / 15 < c <= (m + 1) / 15]
            if inside:
                accuracy = sum(self.top1[i] for i in inside) / len(inside)
                mean = sum(self.confidence[i] for i in inside) / len(inside)
                error += len(inside) / len(self.confidence) * abs(accuracy - mean)
        return error


@pytest.fixture
def slow_score() -> Callable[[Tensor, Tensor], SlowScore]:
    def score(logits: Tensor, labels: Tensor) -> SlowScore:
        found = SlowScore([], [], [])
        for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
            ranked = sorted(range(len(row)), key=lambda i: -row[i])
            found.top1.append(ranked[0] == label)
            found.top5.append(label in ranked[:5])
            likely = np.exp(row - row.max())
            found.confidence.append(float(likely.max() / likely.sum()))
        return found

    return score
