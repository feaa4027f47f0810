"""Leave out copies of photographs, so that a head is not measured on what it was fitted to.

Photographs are copies if the model's pixels of them are equal, also if their files differ.
"""

from collections.abc import Sequence
from hashlib import blake2b

from pcae_serve.errors import PcaeError
from pcae_training.data import LabelledImages
from pcae_training.image_files import display

_DIGEST_BYTES = 16


def drop_copies(photos: LabelledImages) -> tuple[LabelledImages, list[str]]:
    """Return each photograph once, in its order, and a line for each kind of copy left out.

    A photograph that is in several classes is left out altogether: at least one label is wrong.
    Raises PcaeError if none is left.
    """
    if photos.several:
        return photos, []
    same: dict[bytes, list[int]] = {}
    for index in range(len(photos)):
        same.setdefault(_digest(photos, index), []).append(index)
    groups = list(same.values())
    mixed = [group for group in groups if len({int(photos.labels[i]) for i in group}) > 1]
    pure = [group for group in groups if group not in mixed]
    copied = [group for group in pure if len(group) > 1]
    notes = []
    if copied:
        left_out = sum(len(group) - 1 for group in copied)
        notes.append(
            f"{left_out:,} of {len(photos):,} photographs of {photos.name} are left out: each is a"
            f" copy of one that is used, such as {_pair(photos, copied[0])}"
        )
    if mixed:
        left_out = sum(map(len, mixed))
        notes.append(
            f"{left_out:,} of {len(photos):,} photographs of {photos.name} are left out: they are"
            f" copies of each other in different classes, such as {_pair(photos, mixed[0])};"
            " correct their classes"
        )
    if not pure:
        raise PcaeError(f"{photos.name} has no photograph that is in one class only")
    kept = sorted(group[0] for group in pure)
    return photos.subset(kept) if notes else photos, notes


def _digest(photos: LabelledImages, index: int) -> bytes:
    pixels, _ = photos[index]
    return blake2b(pixels.numpy().tobytes(), digest_size=_DIGEST_BYTES).digest()


def _pair(photos: LabelledImages, group: Sequence[int]) -> str:
    """Return two places of a photograph; those of different classes if there are any."""
    first = group[0]
    others = [i for i in group[1:] if photos.labels[i] != photos.labels[first]]
    places = sorted(photos.place(i) for i in (first, (others or group[1:])[0]))
    return " and ".join(map(display, places))
