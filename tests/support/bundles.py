"""Bundles without graphs, which the simulated engine serves, and changed copies of the demo."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import demo_path

TIERS = {"fast": (0.6, 1000, 0.80), "balanced": (0.8, 2000, 0.85), "full": (1.0, 4000, 0.90)}


def manifest(files: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A valid bundle.json: 16 patches, three tiers of 1000, 2000 and 4000 MACs."""
    counts = {0.6: (9, 5, 3), 0.8: (12, 9, 7), 1.0: (16, 16, 16)}
    return {
        "schema_version": 2,
        "name": "test",
        "created": "2026-11-23T00:00:00Z",
        "producer": {"test": "1"},
        "labels": ["dark", "dim", "light", "bright"],
        "models": {
            "vit": {
                "image_size": 8,
                "patches": 16,
                "patch_size": 2,
                "width": 8,
                "depth": 12,
                "parameters": 100,
                "reduction_points": [0, 7, 10],
                "pooling": "mean",
            }
        },
        "tiers": [
            {
                "name": name,
                "model": "vit",
                "keep_ratio": ratio,
                "token_counts": counts[ratio],
                "macs": macs,
                "accuracy": {"top1": top1, "n": 100, "interval": [0.7, 0.95], "data_set": "toy"},
            }
            for name, (ratio, macs, top1) in TIERS.items()
        ],
        "files": files,
    } | changes


def backbone(**fields: Any) -> dict[str, Any]:
    """Changes to a manifest whose model has no head; `fields` are the model's."""
    model = manifest({})["models"]["vit"] | {"answers": "features"} | fields
    return {"schema_version": 3, "labels": [], "models": {"vit": model}}


def write_bundle(root: Path, **changes: Any) -> Path:
    """A bundle whose graphs are empty; `changes` replace parts of its manifest."""
    model = root / "models" / "vit"
    model.mkdir(parents=True)
    preprocess = Preprocess(image_size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    contents = {
        "preprocessor_config.json": json.dumps(preprocess.to_config()).encode(),
        "model.safetensors": b"weights",
        "elastic.onnx": b"\x12\x05graph",  # names its producer, and holds no nodes
    }
    for name, content in contents.items():
        (model / name).write_bytes(content)
    files = {f"models/vit/{n}": hashlib.sha256(c).hexdigest() for n, c in contents.items()}
    (root / "bundle.json").write_text(json.dumps(manifest(files, **changes)))
    return root


def copy_demo(root: Path, processor: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Copy the demo; `processor` and `changes` replace fields of its preprocessing and manifest.

    Its calibration is dropped, because it belongs to the demo's pixels and tiers.
    """
    shutil.copytree(demo_path(), root)
    document = json.loads((root / "bundle.json").read_text()) | {"calibration": None} | changes
    if processor is not None:
        name = "models/vit/preprocessor_config.json"
        file = root / name
        file.write_text(json.dumps(json.loads(file.read_text()) | processor))
        document["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (root / "bundle.json").write_text(json.dumps(document))
    return root
