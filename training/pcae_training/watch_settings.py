"""Settings of what `feature_watch` measures, and the images that it is measured on."""

from typing import NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training.columns import DataChoice
from pcae_training.data import TrainingData, load
from pcae_training.sample_rng import generator

#: Images that are read at a time.
BATCH = 64


class WatchSettings(BaseModel):
    """How the features are watched during pretraining."""

    watch_images: int = Field(
        512,
        ge=0,
        description="images on which the features are measured during the run; 0 = off",
    )
    eval_data: str | None = Field(
        None,
        description="labelled images to measure the features on, for a k-NN accuracy; default:"
        " images of --data, without labels",
    )
    eval_split: str = Field("validation", description="split of --eval-data")


class Sample(NamedTuple):
    """The images on which features are measured."""

    pixels: Tensor  # uint8 [n, 3, S, S] on the CPU
    labels: Tensor | None  # int64 [n]


def draw_training(
    images: TrainingData, count: int, size: int, seed: int, device: torch.device, workers: int
) -> Sample:
    """Return the first `count` images of the first epoch, without augmentation or labels.

    size: side of the model's input, which is cut from the centre.
    """
    count = min(count, len(images))
    slices = [slice(at, min(at + BATCH, count)) for at in range(0, count, BATCH)]
    parts = [pixels.cpu() for pixels, _ in images.epoch(seed, 0, slices, device, workers)]
    whole = torch.cat(parts)
    top, left = ((side - size) // 2 for side in whole.shape[-2:])
    return Sample(whole[..., top : top + size, left : left + size].contiguous(), None)


def draw_labelled(
    settings: WatchSettings,
    preprocess: Preprocess,
    seed: int,
    columns: DataChoice,
    max_unreadable: float,
) -> Sample:
    """Return random images of --eval-data with their labels; unreadable ones are left out.

    Raise PcaeError if they cannot be read or do not have one label each.
    """
    assert settings.eval_data is not None
    images = load(
        settings.eval_data,
        settings.eval_split,
        preprocess,
        max_unreadable=max_unreadable,
        **columns,
    )
    if images.several:
        raise PcaeError(f"{images.name} has lists of labels; --eval-data needs one class an image")
    order = torch.randperm(len(images), generator=generator(seed, "watch"))
    chosen = images.subset(order[: settings.watch_images].tolist()).readable()
    parts = list(chosen.batches(range(len(chosen)), BATCH))
    pixels, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    return Sample(pixels, labels)
