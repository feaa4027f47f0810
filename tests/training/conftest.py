"""Tiny labelled images as people keep them, and caches that end with the test."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

MakeFolders = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
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
