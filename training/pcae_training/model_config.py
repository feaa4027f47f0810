"""config.json of pcae-train's checkpoints, with Hugging Face's field names for those it shares."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from pcae_serve.bundle.config_fields import (
    BOOLEAN,
    COUNT,
    POSITIVE,
    WHOLE,
    Field,
    FieldTable,
    is_count,
)
from pcae_serve.bundle.tokens import Pooling, Rule
from pcae_training.mlp import Activation
from pcae_training.model import ViTConfig

MODEL_TYPE = "pcae_vit"
#: Hugging Face's word for a model whose labels are independent.
MULTI_LABEL = "multi_label_classification"

FIELDS = FieldTable(
    understood={
        "model_type": Field.only(MODEL_TYPE),
        "image_size": COUNT,
        "patch_size": COUNT,
        "num_channels": COUNT,
        "hidden_size": COUNT,
        "num_hidden_layers": COUNT,
        "num_attention_heads": COUNT,
        "intermediate_size": COUNT,
        "layer_norm_eps": POSITIVE,
        "pooling": Field.only(*get_args(Pooling)),
        "reduction_points": Field(
            "a list of blocks",
            lambda value: (
                isinstance(value, list) and all(point == 0 or is_count(point) for point in value)
            ),
        ),
        "reduction": Field.only(*get_args(Rule)),
        "qkv_bias": BOOLEAN,
        "layer_scale": BOOLEAN,
        "distilled": BOOLEAN,
        "num_register_tokens": WHOLE,
        "hidden_act": Field.only(*get_args(Activation)),
        "pre_norm": BOOLEAN,
        "class_token": BOOLEAN,
        "projection_dim": WHOLE,
        "rope_theta": POSITIVE,
        "use_gated_mlp": BOOLEAN,
        "normalise_features": BOOLEAN,
        "id2label": Field(
            "the names of classes 0, 1, 2, …, by number",
            lambda value: (
                isinstance(value, dict)
                and set(value) == {str(i) for i in range(len(value))}
                and all(isinstance(label, str) for label in value.values())
            ),
        ),
        "problem_type": Field.only("single_label_classification", MULTI_LABEL),
    },
    ignorable=frozenset({"architectures", "dtype", "label2id", "transformers_version"}),
)


#: Values of fields that a file of a plain ViT does not have.
DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "pre_norm": False,
    "class_token": True,
    "projection_dim": 0,
    "rope_theta": 0.0,
    "use_gated_mlp": False,
    "normalise_features": False,
}


class ModelDescription(NamedTuple):
    """What config.json describes."""

    config: ViTConfig
    labels: list[str]
    multi_label: bool


def to_config(config: ViTConfig, labels: list[str], multi_label: bool = False) -> dict[str, Any]:
    """Return the content of config.json."""
    content = {
        "model_type": MODEL_TYPE,
        "architectures": ["VisionTransformer"],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
        "pooling": config.pooling,
        "reduction_points": list(config.reduction_points),
        "reduction": config.reduction,
        "qkv_bias": config.qkv_bias,
        "layer_scale": config.layer_scale,
        "distilled": config.distilled,
        "num_register_tokens": config.registers,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    # absent from the files of a plain ViT, so that older versions can read them
    changes = {
        "hidden_act": config.activation,
        "pre_norm": config.pre_norm,
        "class_token": config.class_token,
        "projection_dim": config.projection,
        "rope_theta": config.rope_theta,
        "use_gated_mlp": config.gated_mlp,
        "normalise_features": config.normalised,
    }
    content |= {name: value for name, value in changes.items() if value != DEFAULTS[name]}
    return content | ({"problem_type": MULTI_LABEL} if multi_label else {})


def from_config(content: Mapping[str, Any], file: str = "config.json") -> ModelDescription:
    """Invert `to_config`.

    Raise KeyError if a field is missing, ValueError if its value is invalid or it is not known.
    """
    found = FIELDS.check(file, content)
    if "model_type" not in found:
        raise ValueError(f"{file}: model_type is missing; supported: {MODEL_TYPE}")
    labels = [found["id2label"][str(i)] for i in range(len(found["id2label"]))]
    config = ViTConfig(
        image_size=found["image_size"],
        patch_size=found["patch_size"],
        channels=found["num_channels"],
        width=found["hidden_size"],
        depth=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        mlp_ratio=found["intermediate_size"] / found["hidden_size"],
        classes=len(labels),
        pooling=found["pooling"],
        norm_eps=found["layer_norm_eps"],
        reduction_points=tuple(found["reduction_points"]),
        # checkpoints of version 0.1 do not have the fields below
        reduction=found.get("reduction", "ptr"),
        qkv_bias=found.get("qkv_bias", True),
        layer_scale=found.get("layer_scale", False),
        distilled=found.get("distilled", False),
        registers=found.get("num_register_tokens", 0),
        activation=found.get("hidden_act", DEFAULTS["hidden_act"]),
        pre_norm=found.get("pre_norm", DEFAULTS["pre_norm"]),
        class_token=found.get("class_token", DEFAULTS["class_token"]),
        projection=found.get("projection_dim", DEFAULTS["projection_dim"]),
        rope_theta=found.get("rope_theta", DEFAULTS["rope_theta"]),
        gated_mlp=found.get("use_gated_mlp", DEFAULTS["use_gated_mlp"]),
        normalised=found.get("normalise_features", DEFAULTS["normalise_features"]),
    )
    return ModelDescription(config, labels, found.get("problem_type") == MULTI_LABEL)
