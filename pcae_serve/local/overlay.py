"""Show which patches of an image a tier kept: the dropped ones are veiled."""

from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pcae_serve.runtime.requests import InferenceResult

#: Shortest side of the picture; a smaller input is enlarged.
MIN_SIDE = 224
#: What a veiled pixel keeps of its own colour, and the grey value of the veil.
KEPT_SHARE, VEIL = 0.25, 235.0


def overlay(result: InferenceResult, pixels: NDArray[np.uint8]) -> Image.Image:
    """Return the input of a result with those patches veiled that the last stage dropped.

    pixels: that input, uint8 [H, W, 3].
    """
    model = result.bundle.manifest.models[result.tier.model]
    patch = model.patch_size
    across = model.image_size // patch
    dropped = np.ones(model.patches, bool)
    if result.kept:
        dropped[result.kept[-1]] = False
    else:
        dropped[:] = False
    veiled = np.zeros(pixels.shape[:2], bool)
    grid = dropped.reshape(-1, across).repeat(patch, axis=0).repeat(patch, axis=1)
    veiled[: grid.shape[0], : grid.shape[1]] = grid
    shown = pixels.astype(np.float32)
    shown[veiled] = KEPT_SHARE * shown[veiled] + (1 - KEPT_SHARE) * VEIL
    picture = Image.fromarray(shown.round().astype(np.uint8))
    times = max(1, -(-MIN_SIDE // min(picture.size)))
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def overlay_name(file: str) -> PurePath:
    """Return where the overlay of a file belongs, inside the folder of overlays."""
    parts = [{"..": "__"}.get(part, part) for part in PurePath(file).parts if part != "/"]
    return PurePath(*parts[:-1], f"{parts[-1]}.png")
