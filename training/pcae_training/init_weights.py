"""The weights of --init: where they are, how their images are decoded, and what is used of them."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_serve.sources.locate import locate_checkpoint
from pcae_training.import_weights import LoadedCheckpoint, load_checkpoint
from pcae_training.init_settings import InitSettings
from pcae_training.inventory import print_lines

#: Pixel statistics assumed for weights that come without their preprocessing.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Source(NamedTuple):
    """A checkpoint that --init names."""

    path: Path  # on this machine
    found: LoadedCheckpoint


def load_init(settings: InitSettings) -> Source | None:
    """Load the checkpoint of --init, or return None if there is none. Raise PcaeError."""
    if settings.init is None:
        return None
    lines: list[str] = []
    path = locate_checkpoint(settings.init, lines.append)
    heads = settings.heads if "heads" in settings.model_fields_set else None
    found = load_checkpoint(path, heads=heads, weights=settings.weights)
    if (channels := found.config.channels) != 3:
        raise PcaeError(f"{settings.init} has a patch kernel of {channels} channels; images have 3")
    if lines:  # fetched: recorded, because a name may stand for another commit later
        print_lines(*lines)
        found.training = {**found.training, "source": lines[-1]}
    return Source(path, found)


def choose_preprocess(found: LoadedCheckpoint | None, settings: InitSettings) -> Preprocess:
    """Return the preprocessing of a new model, or the checkpoint's at the size asked for.

    If it is unknown, pixels have ImageNet's statistics.
    """
    if found is None:
        return settings.preprocess(settings.image_size or 224)
    own = found.preprocess
    known = found.config.image_size if own is None else own.image_size
    size = settings.image_size or known  # DINOv2 has positions for 518 pixels, and is used at 224
    if own is None:
        return replace(settings.preprocess(size), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if size == own.image_size:
        return own
    return replace(own, image_size=size, resize=round(own.resize * size / own.image_size))


def report_use(
    name: object, found: LoadedCheckpoint, loaded: int, new: Sequence[str], unused: Sequence[str]
) -> None:
    """Print how many tensors of --init were loaded, which parameters are new and what is left."""
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{name}: {loaded} tensors loaded", file=sys.stderr)
    for what, names in (("newly initialised", new), ("not used", unused)):
        if names:
            print(f"  {what}: {_shorten(names)}", file=sys.stderr)


def _shorten(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
