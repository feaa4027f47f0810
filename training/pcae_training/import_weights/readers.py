"""One reader for each checkpoint format."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import one_line
from pcae_training import checkpoint
from pcae_training.checkpoint import MODEL_TYPE, read_json
from pcae_training.import_weights.detect import Format, Source
from pcae_training.import_weights.loaded import LoadedCheckpoint
from pcae_training.import_weights.rename import rename_weights
from pcae_training.import_weights.sizes import check_shapes, infer_config, list_shapes
from pcae_training.import_weights.tensors import read_state_dict

#: Hugging Face's names of the architectures that are a plain ViT.
MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae")


def read_own(source: Source, heads: int | None) -> LoadedCheckpoint:
    """Read a folder written by pcae-train; `heads` is ignored, as its config.json states them."""
    stored = checkpoint.load(source.path)
    config = stored.model.config
    return LoadedCheckpoint(
        config,
        stored.model.state_dict(),
        stored.labels if config.classes else None,
        stored.preprocess,
        antialias=config.registers > 0,
        training=stored.training,
        reduction_known=True,
    )


def read_hugging_face(source: Source, heads: int | None) -> LoadedCheckpoint:
    """Read a folder of `transformers`. Raise ValueError if its architecture is not supported."""
    config = source.config
    kind, activation = config.get("model_type"), config.get("hidden_act", "gelu")
    if kind not in MODEL_TYPES:
        supported = ", ".join((*MODEL_TYPES, MODEL_TYPE))
        raise ValueError(f"model_type {kind!r} is not supported, only {supported}")
    if config.get("use_swiglu_ffn"):
        raise ValueError("SwiGLU MLPs are not supported")
    if activation != "gelu":
        raise ValueError(f"activation {activation!r} is not supported, only exact 'gelu'")
    return read_weights(source, heads)


def read_weights(source: Source, heads: int | None) -> LoadedCheckpoint:
    """Read a timm folder or a state dict; Hugging Face's tensor names are accepted too."""
    config = source.config
    weights, ignored, antialias = rename_weights(read_state_dict(source.weights))
    heads = heads or config.get("num_attention_heads")
    sizes = infer_config(weights, heads, config.get("layer_norm_eps", 1e-6))
    check_shapes(weights, list_shapes(sizes))
    return LoadedCheckpoint(
        sizes,
        weights,
        _read_labels(config, sizes.classes),
        _read_preprocess(source),
        ignored,
        antialias,
    )


READERS: dict[Format, Callable[[Source, int | None], LoadedCheckpoint]] = {
    Format.OWN: read_own,
    Format.HUGGING_FACE: read_hugging_face,
    Format.TIMM: read_weights,
    Format.STATE_DICT: read_weights,
}


def _read_labels(config: Mapping[str, Any], classes: int) -> list[str] | None:
    labels = config.get("id2label")
    if not classes or not isinstance(labels, dict):
        return None
    if set(labels) != {str(i) for i in range(classes)}:
        raise ValueError(f"config.json names {len(labels)} labels for {classes} classes")
    return [str(labels[str(i)]) for i in range(classes)]


def _read_preprocess(source: Source) -> Preprocess | None:
    """Read preprocessor_config.json next to the weights, else timm's `pretrained_cfg`."""
    file = source.weights.parent / "preprocessor_config.json"
    try:
        if file.exists():
            return _from_hugging_face(file)
        if "pretrained_cfg" in source.config:
            return _from_timm(source.config["pretrained_cfg"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise ValueError(f"its preprocessing cannot be used ({kind}: {one_line(error)})") from None
    return None


def _from_hugging_face(file: Path) -> Preprocess:
    content = read_json(file)
    if isinstance(size := content.get("size"), int):  # early versions of transformers
        content["size"] = {"height": size, "width": size}
    return Preprocess.from_config(content)


def _from_timm(content: Mapping[str, Any]) -> Preprocess:
    if content.get("crop_mode", "center") != "center":
        raise ValueError(f"crop_mode {content['crop_mode']!r} is not supported")
    _, size, _ = content["input_size"]
    return Preprocess(
        image_size=size,
        resize=math.floor(size / content["crop_pct"]),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        resample=Image.Resampling[content["interpolation"].upper()],
    )
