"""Architectures that are not supported, recognised by their model_type or their tensors' names."""

import re
from collections.abc import Iterable

SUPPORTED = (
    "ViTs as timm, MAE, DeiT, DINO and DINOv2 name their tensors, and folders of Hugging Face"
    " (docs/export.md)"
)

#: Patterns of tensors, and whose they are; the first that occurs names the architecture.
_TENSORS = (
    (r"(?:^|\.)resblocks\.\d+\.|^visual\.trunk\.", "OpenCLIP, except in Hugging Face's format"),
    (r"(?:^|\.)layers\.\d+\.(?:blocks|downsample)\.", "Swin, whose stages merge patches"),
    (r"\.(?:conv_dw|dwconv|depthwise_conv)\.", "ConvNeXt"),
    (
        r"relative_position|rel_pos|\.lambda_[12]$",
        "BEiT, Data2Vec, SAM or others with relative positions",
    ),
    (r"\.mlp\.fc1_[gx]\.|\.attn\.[qv]_bias$|(?:^|\.)blocks\.\d+\.attn\.q_proj\.", "EVA or EVA-02"),
    (r"\.encoder_layer_\d+\.", "ViTs of torchvision"),
)

_NAFLEX = "NaFlex, for any aspect ratio; SigLIP 2 of a fixed resolution is of siglip"
#: What to know of a model_type of `transformers` whose relatives are supported.
_MODEL_TYPES = {
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
    "timm_wrapper": "give the folder of timm that it was made from",
}


def check_architecture(tensors: Iterable[str]) -> None:
    """Raise ValueError if tensors have the names of an architecture that is not supported."""
    names = list(tensors)
    for pattern, whose in _TENSORS:
        if found := next(filter(re.compile(pattern).search, names), None):
            raise ValueError(f"not supported: {whose} (tensor {found}); supported: {SUPPORTED}")


def describe_type(model_type: str) -> str:
    """Return what to know of a model_type that is not supported, in brackets; empty if nothing."""
    known = _MODEL_TYPES.get(model_type)
    return f" ({known})" if known else ""
