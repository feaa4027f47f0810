"""Write a small folder of photographs for trials: crops of scikit-image's own, in class folders.

    pip install scikit-image
    python benchmarks/photograph_folder.py OUT [--train 10] [--test 6] [--seed 0]

Writes OUT/train/CLASS/*.jpg from the left half of each photograph and OUT/test/CLASS/*.jpg from the
right half, so that no test pixel is in a training image. One photograph per class makes the task
easy: such a folder shows that commands work and what they cost, not how good a model is.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data

#: Photographs that come with scikit-image itself, one per class.
CLASSES = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "moon", "rocket")
#: Sides of a crop as shares of the shorter side of half a photograph.
SHARES = (0.5, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=10, help="crops per class")
    parser.add_argument("--test", type=int, default=6, help="crops per class")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = np.random.default_rng(options.seed)
    for name in CLASSES:
        photograph = Image.fromarray(getattr(data, name)()).convert("RGB")
        middle = photograph.width // 2
        halves = {
            "train": (photograph.crop((0, 0, middle, photograph.height)), options.train),
            "test": (photograph.crop((middle, 0, *photograph.size)), options.test),
        }
        for split, (half, count) in halves.items():
            folder = options.out / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                crop(half, draw).save(folder / f"{number:02}.jpg", quality=90)


def crop(half: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Return a random square of the half, at its own resolution."""
    side = int(min(half.size) * draw.uniform(*SHARES))
    corner: NDArray[np.int64] = draw.integers(0, np.array(half.size) - side + 1)
    left, top = corner.tolist()
    return half.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    main()
