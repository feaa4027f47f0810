"""preprocessor_config.json: understood or refused by field and value."""

import json
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.processor_config import read_own_processor, read_processor

HALF = (0.5, 0.5, 0.5)
LARGE = Preprocess(image_size=224, resize=256, mean=HALF, std=HALF)
VIT = {"image_processor_type": "ViTImageProcessor"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": 28, "resize": 28},
        {"resample": Image.Resampling.BILINEAR},
        {"squash": True},
        {"squash": True, "resize": 224},
        {"crop_offset": "half-even", "mean": (0.1, 0.2, 0.3), "std": (0.001, 2.0, 3.0)},
    ],
)
def test_what_is_written_is_read(changes: dict[str, Any]) -> None:
    preprocess = replace(LARGE, **changes)
    content = json.loads(json.dumps(preprocess.to_config()))
    assert read_own_processor(content) == preprocess
    assert read_processor(content) == preprocess


@pytest.mark.parametrize("field", ["size", "crop_size", "image_mean", "image_std", "resample"])
def test_our_own_files_have_every_field(field: str) -> None:
    config = LARGE.to_config()
    del config[field]
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {field} is missing"):
        read_own_processor(config)


@pytest.mark.parametrize(
    ("content", "model_type", "expected"),
    [
        (VIT, None, Preprocess(224, 224, HALF, HALF, Image.Resampling.BILINEAR, squash=True)),
        ({}, "vit_mae", Preprocess(224, 224, HALF, HALF, Image.Resampling.BILINEAR, squash=True)),
        ({}, "deit", Preprocess(224, 256, HALF, HALF, squash=True)),
        ({"image_mean": 0.5, "image_std": 0.5}, "dinov2", Preprocess(224, 224, HALF, HALF)),
        (VIT | {"do_pad": None, "foo": None}, "dinov2", replace(LARGE, resize=224, squash=True,
            resample=Image.Resampling.BILINEAR)),
    ],
)  # fmt: skip
def test_absent_fields_have_their_processors_defaults(
    content: dict[str, Any], model_type: str | None, expected: Preprocess
) -> None:
    assert read_processor(content, model_type) == expected


def test_rescaling_is_folded_into_mean_and_std() -> None:
    raw = read_processor(VIT | {"do_rescale": False})
    assert raw.mean == pytest.approx((0.5 / 255,) * 3)
    plain = read_processor(VIT | {"do_normalize": False, "rescale_factor": 1 / 127.5})
    assert plain.mean == (0.0,) * 3
    assert plain.std == pytest.approx((0.5,) * 3)


def test_null_switches_a_step_off_as_in_transformers() -> None:
    raw = read_processor(VIT | {"do_rescale": None, "crop_size": None, "do_center_crop": None})
    assert raw == read_processor(VIT | {"do_rescale": False})
    assert read_processor(VIT | {"do_normalize": None}).std == (1.0,) * 3
    with pytest.raises(ValueError, match="do_center_crop is false with"):
        read_processor({"image_processor_type": "BitImageProcessor", "do_center_crop": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize is false; supported: true"),
        ({"size": {"longest_edge": 256}}, r'size is {"longest_edge": 256}; supported: a number'),
        ({"size": {"shortest_edge": 256, "longest_edge": 512}}, "size is"),
        ({"size": {"height": 224, "width": 320}}, "size is"),
        ({"size": [224, 320]}, "size is"),
        ({"size": 0}, "size is 0"),
        ({"size": True}, "size is true"),
        ({"crop_size": {"shortest_edge": 224}, "do_center_crop": True}, "crop_size is"),
        ({"do_center_crop": True}, "crop_size is missing or null"),
        ({"do_center_crop": True, "crop_size": 300}, "cannot crop 300 pixels out of 224"),
        ({"size": {"shortest_edge": 256}}, "do_center_crop is false with"),
        ({"resample": "bicubic"}, 'resample is "bicubic"; supported: 1, 2, 3 or 5'),
        ({"resample": 4}, "resample is 4; supported: 1, 2, 3 or 5"),
        ({"resample": 9}, "resample is 9"),
        (
            {"resample": 0},
            "resample is 0; supported: 1, 2, 3 or 5, Pillow's filters except the nearest",
        ),
        ({"rescale_factor": 0}, "rescale_factor is 0; supported: a positive number"),
        ({"rescale_offset": True}, "rescale_offset is true; supported: false"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; supported"),
        ({"image_std": 0.0}, "image_std is 0.0; supported: a positive number"),
        ({"do_resize": None}, "do_resize is false; supported: true"),
        ({"size": None}, "size is missing or null"),
        ({"resample": None}, "resample is missing or null"),
        ({"rescale_factor": None}, "rescale_factor is missing or null"),
        ({"image_mean": None}, "image_mean is missing or null"),
        ({"do_center_crop": True, "crop_size": None}, "crop_size is missing or null"),
        ({"do_pad": True}, "do_pad is true; supported: false"),
        ({"do_thumbnail": True}, r'field "do_thumbnail" \(true\) is not known'),
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type is"),
        ({"auto_map": {"AutoImageProcessor": "mine.Mine"}}, 'field "auto_map"'),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_processor(VIT | changes, "vit")
    assert str(caught.value).startswith("preprocessor_config.json: ")
    assert "\n" not in str(caught.value)


def test_a_processor_that_nothing_names_has_no_defaults() -> None:
    with pytest.raises(ValueError, match="size is missing or null, and no image_processor_type"):
        read_processor({"image_mean": 0.5})
