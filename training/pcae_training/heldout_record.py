"""Record which images a run held out, so that later runs can hold out the same ones.

    RUN/holdout.json     name of the data and the images held out, each by the hash of its file

An image is known by the content of its file, wherever the file lies and whatever its row is.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pcae_serve.errors import PcaeError
from pcae_training.checkpoint import RUN_CHECKPOINT, read_json
from pcae_training.data import LabelledImages
from pcae_training.output import write_whole
from pcae_training.progress import Progress

FILE = "holdout.json"
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class HeldOut:
    """The images that a run held out."""

    data: str  # name of the data, for messages
    digests: frozenset[str]  # of the files, in hexadecimal
    sizes: frozenset[int]  # of the files, in bytes: another size is another file

    def write(self, run: Path) -> None:
        """Write the record into the folder of a run."""
        content = {"data": self.data, "n": len(self.digests), "sizes": sorted(self.sizes)}
        content["files"] = sorted(self.digests)
        write_whole(run / FILE, (json.dumps(content, indent=1) + "\n").encode())

    def find(self, images: LabelledImages) -> list[int]:
        """Return the indices of these images among `images`."""
        found = []
        with Progress("looking for held-out images", len(images)) as progress:
            for index in range(len(images)):
                if digest(images, index, self.sizes) in self.digests:
                    found.append(index)
                progress.update(1)
        return found


def record(images: LabelledImages, rows: Sequence[int]) -> HeldOut:
    """Return the record of images held out."""
    digests: list[str] = []
    sizes: set[int] = set()
    for row in rows:
        if body := _body(images, row):
            digests.append(_hash(body))
            sizes.add(len(body))
    return HeldOut(images.name, frozenset(digests), frozenset(sizes))


def read(checkpoint: Path) -> HeldOut | None:
    """Return what the run at or around a checkpoint held out, or None if it is not known.

    Raise PcaeError if the record is damaged.
    """
    run = checkpoint.parent if checkpoint.name == RUN_CHECKPOINT else checkpoint
    file = run / FILE
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        files: Iterable[str] = map(str, content["files"])
        return HeldOut(
            str(content["data"]), frozenset(files), frozenset(map(int, content["sizes"]))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PcaeError(f"{file} is damaged: {error}") from None


def digest(images: LabelledImages, index: int, sizes: frozenset[int]) -> str | None:
    """Return the hash of an image file, or None if its size is none of `sizes`."""
    path = images.path(index)
    if path is not None:
        try:
            if path.stat().st_size not in sizes:
                return None
        except OSError:
            return None  # reported as unreadable when it is decoded
    body = _body(images, index)
    return _hash(body) if len(body) in sizes else None


def _body(images: LabelledImages, index: int) -> bytes:
    """Return the file of an image; an empty one if it cannot be read, which is reported later."""
    try:
        return images.body(index)
    except PcaeError:
        return b""


def _hash(body: bytes) -> str:
    return blake2b(body, digest_size=_DIGEST_BYTES).hexdigest()
