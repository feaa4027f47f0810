"""The models: a bundle for pcae-serve, the same graph for the peers, and JPEG images to send."""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.environments import FOLDER
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle

#: Images of the demo: the first ones of the test split, as JPEG of this quality.
DEMO_IMAGES, QUALITY = 2000, 95
#: Size and number of the photographs' crops for ViT-Ti.
PHOTOGRAPH, PHOTOGRAPHS = (500, 375), 8


@dataclass(frozen=True)
class Setting:
    """A model at a fixed tier."""

    model: str
    tier: str

    @property
    def name(self) -> str:
        return f"{self.model}@{self.tier}"

    @property
    def folder(self) -> Path:
        return FOLDER / "models" / self.model

    @property
    def description(self) -> Path:
        return self.folder / "model.json"

    def images(self) -> list[bytes]:
        """Return the JPEG files, in the order of their labels."""
        return [path.read_bytes() for path in sorted((self.folder / "images").glob("*.jpg"))]

    def accuracies(self) -> dict[str, float]:
        """Return the top-1 of each tier on the whole test split, as the bundle states it."""
        found: dict[str, float] = json.loads(self.description.read_text())["accuracy"]
        return found

    def labels(self) -> list[int] | None:
        """Return the images' classes; None for random weights."""
        found: list[int] | None = json.loads(self.description.read_text())["image_labels"]
        return found


def prepare(model: str, data: Path | None) -> None:
    """Write a model's folder unless it exists. data: folder of Fashion-MNIST's parquet files.

    Raise SystemExit if the demo has no data.
    """
    folder = FOLDER / "models" / model
    if (folder / "model.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    if model == "demo":
        shutil.copytree(demo_path(), folder / "bundle")
        images, labels = _fashion(data)
    else:
        _export_vit(folder / "bundle", model)
        images, labels = _photographs(), None
    for i, image in enumerate(images):
        (folder / "images" / f"{i:05}.jpg").write_bytes(image)
    described = _describe(load_bundle(folder / "bundle"))
    content = described | {"image_labels": labels}
    (folder / "model.json").write_text(json.dumps(content, indent=1))


def _describe(bundle: Bundle) -> dict[str, Any]:
    """Return what a peer's handler needs: graph, token counts, sizes, labels."""
    full = bundle.tiers[-1]
    return {
        "graph": f"bundle/models/{full.model}/{full.elastic_graph}",
        "tiers": {tier.name: list(tier.token_counts) for tier in bundle.tiers},
        "accuracy": {t.name: t.accuracy.top1 if t.accuracy else None for t in bundle.tiers},
        "image_size": bundle.image_size,
        "resize": bundle.preprocess.resize,
        "labels": list(bundle.labels),
    }


def _fashion(data: Path | None) -> tuple[list[bytes], list[int]]:
    from PIL import Image
    from pyarrow import parquet

    files = sorted(data.glob("test-*.parquet")) if data else []
    if not files:
        raise SystemExit("--data must name a folder with Fashion-MNIST's test-*.parquet")
    table = parquet.read_table(files[0]).slice(0, DEMO_IMAGES)
    bodies = [_jpeg(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    return bodies, table["label"].to_pylist()


def _photographs() -> list[bytes]:
    """Return crops of the two photographs that scikit-learn carries."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    bodies = []
    for i in range(PHOTOGRAPHS):
        image = Image.fromarray(load_sample_images().images[i % 2])
        width, height = PHOTOGRAPH
        x, y = (
            int(random.integers(a - b + 1)) for a, b in zip(image.size, PHOTOGRAPH, strict=True)
        )
        bodies.append(_jpeg(image.crop((x, y, x + width, y + height)), quality=85))
    return bodies


def _jpeg(image: Any, quality: int = QUALITY) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _export_vit(out: Path, model: str) -> None:
    """Export a ViT at 224 pixels with random weights, which do not change the speed."""
    import torch

    from pcae_export import pack
    from pcae_export.pack import Part, TierSpec
    from pcae_serve.bundle.preprocess import Preprocess
    from pcae_training.checkpoint import Checkpoint
    from pcae_training.model import VisionTransformer, ViTConfig

    widths = {"vit-ti": ViTConfig(width=192, heads=3), "vit-b": ViTConfig(width=768, heads=12)}
    torch.manual_seed(0)
    preprocess = Preprocess(image_size=224, resize=256, mean=(0.5,) * 3, std=(0.5,) * 3)
    labels = [f"class {i}" for i in range(1000)]
    checkpoint = Checkpoint(VisionTransformer(widths[model]), preprocess, labels)
    tiers = {"k06": TierSpec("0.6"), "full": TierSpec("1")}
    pack.write_bundle({"vit": Part(checkpoint, tiers)}, out)
