"""Models of `transformers` of each family that the exporter takes, with random weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.foreign_checkpoints import SIZES, randomised


class Member(NamedTuple):
    """A class of `transformers`: its configuration, and what it computes of an image."""

    name: str
    changes: Mapping[str, Any]  # to SIZES
    answer: Callable[[Any, Tensor], Tensor]


def pooled(model: Any, images: Tensor) -> Tensor:
    found: Tensor = model(images).pooler_output
    return found


def logits(model: Any, images: Tensor) -> Tensor:
    found: Tensor = model(images).logits
    return found


def embedded(model: Any, images: Tensor) -> Tensor:
    found: Tensor = model(images).image_embeds
    return found


def of_pair(model: Any, images: Tensor) -> Tensor:
    found: Tensor = model.get_image_features(images).pooler_output
    return found


#: Sizes of a text tower, which export does not read.
TEXT: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
}
WIDE: dict[str, Any] = {"intermediate_size": 40}
PAIR: dict[str, Any] = {"text_config": TEXT, "vision_config": SIZES | WIDE}
LABELS = {"id2label": {i: f"class {i}" for i in range(5)}}

FAMILIES: Mapping[str, Member] = {
    "clip": Member("CLIPModel", PAIR | {"projection_dim": 12}, of_pair),
    "clip-tower": Member("CLIPVisionModel", WIDE | {"hidden_act": "gelu"}, pooled),
    "clip-projected": Member(
        "CLIPVisionModelWithProjection", WIDE | {"projection_dim": 12}, embedded
    ),
    "siglip": Member("SiglipModel", PAIR, of_pair),
    "siglip-tower": Member("SiglipVisionModel", WIDE, pooled),
    "siglip-classifier": Member("SiglipForImageClassification", PAIR | LABELS, logits),
    "dinov2-gated": Member("Dinov2Model", {"mlp_ratio": 3, "use_swiglu_ffn": True}, pooled),
    "dinov2-classifier": Member(
        "Dinov2WithRegistersForImageClassification",
        {"mlp_ratio": 3, "use_swiglu_ffn": True, "num_register_tokens": 3} | LABELS,
        logits,
    ),
    "dinov3": Member("DINOv3ViTModel", WIDE | {"num_register_tokens": 3}, pooled),
    "dinov3-gated": Member(
        "DINOv3ViTModel",
        WIDE | {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 3},
        pooled,
    ),
}
#: One of a real size per family, of up to 90 million parameters in the vision tower.
REAL: Mapping[str, Member] = {
    "clip-b-32": Member("CLIPVisionModelWithProjection", {}, embedded),
    "siglip-b-16": Member("SiglipVisionModel", {}, pooled),  # 93 million, the smallest published
    "dinov2-s-14": Member(
        "Dinov2WithRegistersForImageClassification",
        {"hidden_size": 384, "num_attention_heads": 6, "num_labels": 1000},
        logits,
    ),
    "dinov3-s-16": Member("DINOv3ViTModel", {"num_register_tokens": 4}, pooled),
}


def build(transformers: Any, kind: str) -> Any:
    """Return a tiny model of a family, every parameter random."""
    return randomised(_configured(transformers, FAMILIES[kind], SIZES))


def build_real(transformers: Any, kind: str) -> Any:
    """Return a model of a real size: initial weights, and noise so that none is zero or one."""
    torch.manual_seed(0)
    model = _configured(transformers, REAL[kind], {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def _configured(transformers: Any, member: Member, sizes: Mapping[str, Any]) -> Any:
    kind = getattr(transformers, member.name)
    changes = dict(member.changes)
    given = changes if "vision_config" in changes else {**sizes, **changes}
    return kind(kind.config_class(**given))


def write(model: Any, folder: Path) -> Path:
    """Save a model, and return where."""
    model.save_pretrained(folder)
    return folder
