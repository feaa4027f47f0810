"""Flags of `pcae-export bundle` that say which images second looks are calibrated on."""

import sys
from collections.abc import Sequence

from pydantic import BaseModel, Field

from pcae_export.calibrate import LEAST_IMAGES
from pcae_export.images import IMAGES_HELP, shuffle_rows
from pcae_serve.errors import PcaeError
from pcae_training.data import LabelledImages
from pcae_training.heldout_record import HeldOut

#: Images to calibrate on, at most, unless a number is given.
MOST_IMAGES = 5000
#: Images of --eval-data of which one is for calibration, by default.
OF_IMAGES = 3


class CalibrationFlags(BaseModel):
    """Which images calibrate the tiers; never those that report accuracy."""

    calibration_data: str | None = Field(
        None,
        description=f"images to calibrate on: {IMAGES_HELP}; of the images that SOURCE was trained"
        " with, those that it held out (default: a part of --eval-data, which then reports no"
        " accuracy)",
    )
    calibration_split: str = Field("train", description="split of --calibration-data")
    calibration_images: int | None = Field(
        None,
        ge=0,
        description="number of images to calibrate on; 0: none, so that no image runs twice"
        f" (default: at most {MOST_IMAGES:,}, and a third of --eval-data)",
    )

    def calibration_count(self, available: int) -> int:
        """Return how many of the images of --eval-data calibrate. Raises PcaeError for all."""
        wanted = self.calibration_images
        if self.calibration_data is not None or wanted == 0:
            return 0
        if wanted is None:
            count = min(MOST_IMAGES, available // OF_IMAGES)
            return count if count >= LEAST_IMAGES else 0
        if wanted < LEAST_IMAGES:
            raise PcaeError(
                f"--calibration-images {wanted} is too few to say how sure an answer is; give at"
                f" least {LEAST_IMAGES}, or 0 for none"
            )
        if wanted >= available:
            raise PcaeError(
                f"--calibration-images {wanted} leaves none of {available} images to measure"
                " accuracy on; lower it, or give other images as --calibration-data"
            )
        return wanted

    def limit_with_calibration(self, limit: int) -> int:
        """Return how many images of --eval-data are needed to measure on `limit` of them."""
        if self.calibration_data is not None:
            return limit
        if self.calibration_images is not None:
            return limit + self.calibration_images
        return limit + limit // (OF_IMAGES - 1)

    def calibration_rows(self, images: LabelledImages, held_out: HeldOut | None) -> Sequence[int]:
        """Return the rows of --calibration-data to calibrate on.

        held_out: of SOURCE's training, if known. Raises PcaeError if there are too few images.
        """
        rows = shuffle_rows(len(images))
        if held_out is not None and (found := set(held_out.find(images))):
            rows = [row for row in rows if row in found]
            print(
                f"note: calibrating on {len(rows):,} images held out in training", file=sys.stderr
            )
        rows = rows[: self.calibration_images or MOST_IMAGES]
        if len(rows) < LEAST_IMAGES:
            raise PcaeError(
                f"{images.name} has only {len(rows)} images to calibrate on; give at least"
                f" {LEAST_IMAGES}, or omit --calibration-data"
            )
        return rows
