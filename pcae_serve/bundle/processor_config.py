"""Read preprocessor_config.json: this project's, and those of Hugging Face's image processors.

A field that is absent has the default of its processor's class in `transformers` 5. Rescaling is
folded into mean and std, because the graphs divide pixels by 255.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from pcae_serve.bundle.config_fields import (
    BOOLEAN,
    POSITIVE,
    Field,
    FieldTable,
    is_count,
    is_number,
)
from pcae_serve.bundle.preprocess import Preprocess

FILE = "preprocessor_config.json"


class Defaults(NamedTuple):
    """What a processor's class does if its configuration does not state it."""

    size: int
    size_is_square: bool  # a number as `size` is the length of both sides, not of the shorter one
    crop_size: int | None
    resample: Image.Resampling
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_HALF = (0.5, 0.5, 0.5)
_BICUBIC = Image.Resampling.BICUBIC
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

#: By the processor's name, without "ImageProcessor" or "FeatureExtractor".
PROCESSORS = {
    "ViT": Defaults(224, True, None, Image.Resampling.BILINEAR, _HALF, _HALF),
    "DeiT": Defaults(256, True, 224, _BICUBIC, _HALF, _HALF),
    "Bit": Defaults(224, False, 224, _BICUBIC, _CLIP_MEAN, _CLIP_STD),
    "CLIP": Defaults(224, False, 224, _BICUBIC, _CLIP_MEAN, _CLIP_STD),
    "Siglip": Defaults(224, True, None, _BICUBIC, _HALF, _HALF),
    "DINOv3ViT": Defaults(
        224, True, None, Image.Resampling.BILINEAR, _IMAGENET_MEAN, _IMAGENET_STD
    ),
}
_NAMES = {
    f"{name}{kind}": defaults
    for name, defaults in PROCESSORS.items()
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
#: The processor of a model whose preprocessor_config.json names none.
PROCESSOR_OF_MODEL = {
    "vit": "ViT",
    "vit_mae": "ViT",
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "siglip": "Siglip",
    "siglip_vision_model": "Siglip",
    "dinov3_vit": "DINOv3ViT",
}


def _is_square(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 2 and is_count(value[0]) and value[0] == value[1]
    if isinstance(value, Mapping):
        return set(value) == {"height", "width"} and _is_square([value["height"], value["width"]])
    return is_count(value)


def _is_size(value: Any) -> bool:
    shorter = isinstance(value, Mapping) and set(value) == {"shortest_edge"}
    return is_count(value["shortest_edge"]) if shorter else _is_square(value)


def _is_per_channel(value: Any) -> bool:
    return is_number(value) or (
        isinstance(value, list) and len(value) == 3 and all(map(is_number, value))
    )


#: Fields in which null is a value of its own in `transformers`: no default takes its place.
_NULLABLE = frozenset((
    "size", "default_to_square", "resample", "crop_size", "rescale_factor", "image_mean",
    "image_std",
))  # fmt: skip


_NAME = Field(
    ", ".join(f"{name}ImageProcessor" for name in PROCESSORS)
    + "; the same with Fast, or with FeatureExtractor in place of ImageProcessor",
    lambda value: isinstance(value, str) and value in _NAMES,
)
FIELDS = FieldTable(
    understood={
        "image_processor_type": _NAME,
        "feature_extractor_type": _NAME,
        "do_resize": Field.only(True),
        "size": Field(
            'a number, [n, n], {"height": n, "width": n} or {"shortest_edge": n}', _is_size
        ),
        "default_to_square": BOOLEAN,
        "resample": Field(
            # the others take whole pixels, and so give other values for a part of an image
            "1, 2, 3 or 5, Pillow's filters except the nearest pixel and the box",
            lambda value: type(value) is int and value in (1, 2, 3, 5),
        ),
        "do_center_crop": BOOLEAN,
        "crop_size": Field('a number, [n, n] or {"height": n, "width": n}', _is_square),
        "crop_offset": Field.only("floor", "half-even"),
        "do_rescale": BOOLEAN,
        "rescale_factor": POSITIVE,
        "rescale_offset": Field.only(False),
        "do_normalize": BOOLEAN,
        "image_mean": Field("a number or one per channel", _is_per_channel),
        "image_std": Field(
            "a positive number or one per channel",
            lambda value: (
                _is_per_channel(value)
                and all(x > 0 for x in (value if isinstance(value, list) else [value]))
            ),
        ),
        "do_pad": Field.only(False),
    },
    ignorable=frozenset({
        "_processor_class", "_valid_processor_keys", "data_format", "device", "disable_grouping",
        "do_convert_rgb", "image_seq_length", "input_data_format", "pad_size", "processor_class",
        "return_tensors", "transformers_version",
    }),
)  # fmt: skip


def read_own_processor(content: Mapping[str, Any], file: str = FILE) -> Preprocess:
    """Read what `Preprocess.to_config` wrote, without defaults.

    Raise ValueError with one line if it is not valid.
    """
    for name in ("size", "resample", "do_center_crop", "image_mean", "image_std"):
        if name not in content:
            raise ValueError(f"{file}: {name} is missing")
    return read_processor(content, file=file)


def read_processor(
    content: Mapping[str, Any], model_type: str | None = None, file: str = FILE
) -> Preprocess:
    """Return the preprocessing that a configuration describes.

    model_type: of the model's config.json, which implies the processor if `content` names none.
    Raise ValueError with one line that names the field and its value.
    """
    found = FIELDS.check(file, {name: _switch(name, value) for name, value in content.items()})
    found |= {name: None for name in _NULLABLE & content.keys() if content[name] is None}
    defaults = _defaults(found, model_type)
    image_size, resize, squash = _sizes(found, defaults, file)
    mean, std = _normalisation(found, defaults, file)
    implied = None if defaults is None else defaults.resample
    resample = _required(found.get("resample", implied), "resample", file)
    try:
        return Preprocess(
            image_size=image_size,
            resize=resize,
            mean=mean,
            std=std,
            resample=Image.Resampling(resample),
            squash=squash,
            crop_offset=found.get("crop_offset", "floor"),
        )
    except ValueError as error:  # of Preprocess
        raise ValueError(f"{file}: {error}") from None


def _switch(name: str, value: Any) -> Any:
    """Return a field's value; null switches a step off, as in `transformers`."""
    return False if value is None and name.startswith("do_") else value


def _defaults(found: Mapping[str, Any], model_type: str | None) -> Defaults | None:
    name = found.get("image_processor_type", found.get("feature_extractor_type"))
    if name is not None:
        return _NAMES[name]
    processor = PROCESSOR_OF_MODEL.get(model_type or "")
    return PROCESSORS[processor] if processor else None


def _required(value: Any, name: str, file: str) -> Any:
    if value is None:
        raise ValueError(
            f"{file}: {name} is missing or null, and no image_processor_type implies it"
        )
    return value


def _sizes(found: Mapping[str, Any], defaults: Defaults | None, file: str) -> tuple[int, int, bool]:
    """Return image_size, resize and squash of `Preprocess`."""
    size = _required(found.get("size", defaults and defaults.size), "size", file)
    square = found.get("default_to_square", defaults is None or defaults.size_is_square)
    squash = square if isinstance(size, int) else "shortest_edge" not in size
    resize = size["shortest_edge"] if isinstance(size, Mapping) and not squash else _side(size)
    default_crop = None if defaults is None else defaults.crop_size
    if found.get("do_center_crop", default_crop is not None):
        crop_size = _required(found.get("crop_size", default_crop), "crop_size", file)
        return _side(crop_size), resize, squash
    if not squash:
        raise ValueError(
            f"{file}: do_center_crop is false with the size of the shortest edge, so images are not"
            " square; supported: true"
        )
    return resize, resize, True


def _side(size: Any) -> int:
    """Return the side of a square size in any form."""
    if isinstance(size, Mapping):
        size = size["height"]
    return int(size[0] if isinstance(size, list) else size)


def _normalisation(
    found: Mapping[str, Any], defaults: Defaults | None, file: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of pixels divided by 255 that give what the processor gives."""
    factor = 1
    if found.get("do_rescale", True):
        factor = _required(found.get("rescale_factor", 1 / 255), "rescale_factor", file)
    if found.get("do_normalize", True):
        mean = _per_channel(found.get("image_mean", defaults and defaults.mean), "image_mean", file)
        std = _per_channel(found.get("image_std", defaults and defaults.std), "image_std", file)
    else:
        mean, std = (0.0,) * 3, (1.0,) * 3
    scale = 255 * factor
    if abs(scale - 1) < 1e-9:
        return mean, std
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def _per_channel(value: Any, name: str, file: str) -> tuple[float, ...]:
    value = _required(value, name, file)
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3
