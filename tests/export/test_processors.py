"""Pixels and probabilities of Hugging Face's folders equal those of `transformers`.

Every processor with every family, on pictures of odd shapes; one of each in the fast tests.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pcae_export.source import SourceOverrides, read_source
from pcae_serve.bundle.probabilities import sigmoid, softmax
from pcae_serve.bundle.processor_config import read_processor
from tests.support.foreign_checkpoints import SIZES, randomised

#: Width and height.
SHAPES = [(150, 90), (91, 150), (37, 38), (24, 24), (301, 40), (28, 57)]
CROP = {"crop_size": {"height": 24, "width": 24}}

#: Content of preprocessor_config.json by kind.
PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}},
    "vit-integer": {"feature_extractor_type": "ViTFeatureExtractor", "size": 24},
    "vit-fast": {"image_processor_type": "ViTImageProcessorFast", "size": 24, "resample": 3},
    "vit-raw-values": {
        "image_processor_type": "ViTImageProcessor", "size": 24, "do_rescale": False
    },
    "vit-signed": {
        "image_processor_type": "ViTImageProcessor", "size": 24, "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 0.9, 0.8], "image_std": 1.5,
    },
    "vit-plain": {"image_processor_type": "ViTImageProcessor", "size": 24, "do_normalize": False},
    "vit-unscaled-plain": {
        "image_processor_type": "ViTImageProcessor", "size": 24, "do_normalize": False,
        "rescale_factor": 0.01,
    },
    "deit": {
        "image_processor_type": "DeiTImageProcessor", "size": {"height": 31, "width": 31}, **CROP
    },
    "deit-integers": {
        "feature_extractor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": 24
    },
    "deit-uncropped": {
        "image_processor_type": "DeiTImageProcessor", "size": 24, "do_center_crop": False
    },
    "deit-shortest": {
        "image_processor_type": "DeiTImageProcessor", "size": {"shortest_edge": 27}, "crop_size": 24
    },
    "bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 27}, **CROP},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 27}, **CROP},
    "siglip": {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 24, "width": 24},
        "resample": 2,
    },
    "clip-integers": {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 24
    },
    "bit-integers": {"image_processor_type": "BitImageProcessor", "size": 28, "crop_size": 24},
    "bit-square": {
        "image_processor_type": "BitImageProcessor", "size": {"height": 27, "width": 27}, **CROP
    },
    "bit-by-default-square": {
        "image_processor_type": "BitImageProcessor", "size": 27, "default_to_square": True,
        "crop_size": [24, 24], "resample": 1,
    },
}  # fmt: skip

#: Class in `transformers`, and changes to its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {"intermediate_size": 40}),
    "deit": ("DeiTForImageClassification", {"intermediate_size": 40}),
    "deit-distilled": ("DeiTForImageClassificationWithTeacher", {"intermediate_size": 40}),
    "dinov2": ("Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "dinov2-registers": ("Dinov2WithRegistersForImageClassification", {"num_register_tokens": 3}),
    "multi-label": (
        "ViTForImageClassification",
        {"intermediate_size": 40, "problem_type": "multi_label_classification"},
    ),
    "single-label": (
        "DeiTForImageClassification",
        {"intermediate_size": 40, "problem_type": "multi_label_classification", "num_labels": 1},
    ),
}
FAST = {
    ("vit", "vit-raw-values"), ("deit", "deit-integers"), ("dinov2", "bit"), ("multi-label", "vit"),
    ("single-label", "deit"), ("deit-distilled", "vit-signed"),
    ("dinov2-registers", "bit-integers"), ("vit", "clip-integers"), ("vit", "siglip"),
}  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize(
    ("model", "processor"),
    [
        pytest.param(model, processor, marks=[] if (model, processor) in FAST else pytest.mark.slow)
        for model in MODELS
        for processor in PROCESSORS
    ],
)
def test_pixels_and_probabilities_are_those_of_transformers(
    hugging_face: Any, model: str, processor: str, tmp_path: Path
) -> None:
    name, changes = MODELS[model]
    kind = getattr(hugging_face, name)
    theirs = randomised(kind(kind.config_class(**{**SIZES, "num_labels": 5, **changes})))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[processor]))
    processed = hugging_face.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    checkpoint = read_source(tmp_path, SourceOverrides()).checkpoint
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (checkpoint.preprocess.mean, checkpoint.preprocess.std)
    )
    for number, shape in enumerate(SHAPES):
        picture = cloudy(shape, number)
        body = io.BytesIO()
        picture.save(body, "PNG")
        pixels = torch.from_numpy(checkpoint.preprocess(body.getvalue()).copy()).permute(2, 0, 1)
        ours = (pixels.float() / 255 - mean) / std
        expected = processed(images=picture, return_tensors="pt")["pixel_values"][0].float()
        steps = (ours - expected).abs() * 255 * std  # in steps of the 8-bit pixels
        # Pillow may round a value of a resized part to the other side than of the resized whole
        assert steps.max() < 1.1, shape
        assert steps.mean() < 0.15, shape
        logits = checkpoint.model(expected[None])[0].numpy()
        same = theirs(expected[None]).logits[0].numpy()
        np.testing.assert_allclose(logits, same, atol=1e-4 * max(1, np.abs(same).max()))
        if number == 0:
            _check_pipeline(hugging_face, theirs, processed, picture, logits, checkpoint)


def test_pixels_of_dinov3_are_those_of_its_processor() -> None:
    """Its class in `transformers` needs torchvision: it resizes floats, as torch does here."""
    content = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": 24, "resample": 2}
    preprocess = read_processor(content)
    for number, shape in enumerate(SHAPES):
        picture = cloudy(shape, number)
        body = io.BytesIO()
        picture.save(body, "PNG")
        whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        resized = F.interpolate(whole, (24, 24), mode="bilinear", antialias=True)[0]
        ours = torch.from_numpy(preprocess(body.getvalue()).copy()).permute(2, 0, 1).float()
        assert (ours - resized).abs().max() < 1.1, shape
        assert (ours - resized).abs().mean() < 0.3, shape  # Pillow rounds to whole numbers


def _check_pipeline(
    hugging_face: Any, theirs: Any, processed: Any, picture: Any, logits: Any, checkpoint: Any
) -> None:
    """Compare probabilities with those of the library's own pipeline."""
    pipeline = hugging_face.pipeline(
        "image-classification", model=theirs, image_processor=processed, device="cpu"
    )
    expected = {each["label"]: each["score"] for each in pipeline(picture, top_k=99)}
    convert = sigmoid if checkpoint.answers == "labels" else softmax
    found = dict(zip(checkpoint.labels, convert(logits), strict=True))
    assert found == pytest.approx(expected, abs=1e-4)


def cloudy(size: tuple[int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
