"""Read config.json of timm's vision transformers: architecture, model_args and pretrained_cfg.

The architecture's name implies what no tensor shows; names with unknown parts (clip, siglip, rope,
…) are refused. An absent field has its default in timm.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pcae_serve.bundle.config_fields import (
    BOOLEAN,
    COUNT,
    POSITIVE,
    SQUARE,
    WHOLE,
    Field,
    FieldTable,
    is_count,
    is_number,
)
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import Pooling
from pcae_training.import_weights.description import check_sizes
from pcae_training.import_weights.rename import Renamed
from pcae_training.model import ViTConfig

FILE = "config.json"
NORM_EPS = 1e-6
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PCT = 0.875
IMAGE_SIZE = 224

#: Width and heads of the sizes in an architecture's name.
SIZES = {
    "tiny": (192, 3),
    "little": (320, 5),
    "small": (384, 6),
    "medium": (512, 8),
    "betwixt": (640, 10),
    "base": (768, 12),
    "large": (1024, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "gigantic": (1664, 16),
}
_ARCHITECTURE = re.compile(
    rf"(?:vit|deit|deit3)_(?P<size>{'|'.join(SIZES)})"
    r"(?P<rest>(?:_(?:distilled|patch\d+|reg\d|gap|dinov2|dino|mae|\d+))*)"
)

_POOL = Field.only("token", "avg")
_NAMES = Field(
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)
_CHANNELS = Field(
    "three numbers",
    lambda value: isinstance(value, list) and len(value) == 3 and all(map(is_number, value)),
)

FIELDS = FieldTable(
    understood={
        "architecture": Field(
            f"vit_, deit_ or deit3_ with {', '.join(SIZES)}, and patchN, regN, gap, distilled,"
            " dinov2, dino, mae",
            lambda value: (
                isinstance(value, str)
                and _ARCHITECTURE.fullmatch(value.partition(".")[0]) is not None
            ),
        ),
        "num_classes": WHOLE,
        "num_features": COUNT,
        "global_pool": _POOL,
        "label_names": _NAMES,
        "model_args": Field("an object", lambda value: isinstance(value, dict)),
        "pretrained_cfg": Field("an object", lambda value: isinstance(value, dict)),
    },
    ignorable=frozenset({"label_descriptions", "tag", "license", "description", "license_name"}),
)
MODEL_ARGS = FieldTable(
    understood={
        "act_layer": Field.only("gelu"),
        "class_token": Field.only(True),
        "depth": COUNT,
        "embed_dim": COUNT,
        "fc_norm": BOOLEAN,
        "final_norm": Field.only(True),
        "global_pool": _POOL,
        "img_size": SQUARE,
        "in_chans": COUNT,
        "init_values": Field("a number", is_number),
        "mlp_ratio": POSITIVE,
        "no_embed_class": BOOLEAN,
        "norm_layer": Field.only("layernorm"),
        "num_classes": WHOLE,
        "num_heads": COUNT,
        "patch_size": SQUARE,
        "pool_include_prefix": Field.only(False),
        "pos_embed": Field.only("learn"),
        "pre_norm": Field.only(False),
        "proj_bias": Field.only(True),
        "qk_norm": Field.only(False),
        "qkv_bias": BOOLEAN,
        "reg_tokens": WHOLE,
        "scale_attn_norm": Field.only(False),
        "scale_mlp_norm": Field.only(False),
    },
    ignorable=frozenset({
        "attn_drop_rate", "drop_path_rate", "drop_rate", "dynamic_img_pad", "dynamic_img_size",
        "fix_init", "patch_drop_rate", "pos_drop_rate", "proj_drop_rate", "strict_img_size",
        "weight_init",
    }),
)  # fmt: skip
PRETRAINED_CFG = FieldTable(
    understood={
        "crop_mode": Field.only("center", "squash"),
        "crop_pct": Field(
            "a number above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1
        ),
        "global_pool": _POOL,
        "input_size": Field(
            "[3, n, n]",
            lambda value: (
                isinstance(value, list)
                and len(value) == 3
                and all(map(is_count, value))
                and value[1] == value[2]
            ),
        ),
        "interpolation": Field.only("bicubic", "bilinear", "lanczos", "hamming"),
        "label_names": _NAMES,
        "mean": _CHANNELS,
        "num_classes": WHOLE,
        "std": Field(
            "three positive numbers",
            lambda value: _CHANNELS.accepts(value) and all(x > 0 for x in value),
        ),
    },
    ignorable=frozenset({
        "architecture", "classifier", "custom_load", "description", "file", "first_conv",
        "fixed_input_size", "hf_hub_filename", "hf_hub_id", "label_descriptions", "license",
        "min_input_size", "notes", "origin_url", "paper_ids", "paper_name", "pool_size",
        "pretrained", "source", "state_dict", "tag", "test_crop_pct", "test_input_size", "url",
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What config.json says of a model."""

    found: Mapping[str, Any]
    args: Mapping[str, Any]
    pretrained: Mapping[str, Any]

    @property
    def pool(self) -> str:
        """Return timm's global_pool. Raise ValueError if two places contradict each other."""
        given = {
            f"{place}global_pool": fields["global_pool"]
            for place, fields in (
                ("model_args.", self.args), ("pretrained_cfg.", self.pretrained), ("", self.found)
            )
            if "global_pool" in fields
        }  # fmt: skip
        if len(set(given.values())) > 1:
            stated = ", ".join(f"{name} is {value!r}" for name, value in given.items())
            raise ValueError(f"{FILE}: {stated}; supported: the same value")
        average = "_gap" in self.found["architecture"]
        return next(iter(given.values()), "avg" if average else "token")

    @property
    def normed_after_pooling(self) -> bool:
        """Return whether the final norm follows the pooling (timm's fc_norm)."""
        return bool(self.args.get("fc_norm", self.pool == "avg"))

    @property
    def pooling(self) -> Pooling:
        if self.pool == "token":
            return "cls"
        return "mean" if self.normed_after_pooling else "normed-mean"

    @property
    def stated(self) -> Mapping[str, Any]:
        """Return fields of ViTConfig that no tensor shows."""
        name = _parsed(self.found["architecture"])
        gated = name["size"] == "giant" and "dinov2" in name["rest"]
        return {"gated_mlp": True, "activation": "silu"} if gated else {}

    def arrange(self, renamed: Renamed) -> Renamed:
        """Check that the final norm is where the configuration has it, and name it as we do."""
        norm = "fc_norm" if self.normed_after_pooling else "norm"
        if f"{norm}.weight" not in renamed.weights:
            raise ValueError(
                f"{FILE}: global_pool {self.pool!r} with fc_norm"
                f" {str(self.normed_after_pooling).lower()} needs {norm}.weight, which is missing"
            )
        if norm == "norm" or self.pooling == "mean":
            return renamed
        weights = {
            re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in renamed.weights.items()
        }
        return renamed._replace(weights=weights)

    def heads(self, width: int, given: int | None) -> int | None:
        """Return the number of heads of a model of `width`; None for the published models'."""
        if given or "num_heads" in self.args:
            return given or int(self.args["num_heads"])
        published, heads = SIZES[_parsed(self.found["architecture"])["size"]]
        # a width of model_args leaves timm's number of heads as it is
        return heads if width == published or "embed_dim" in self.args else None

    def check(self, config: ViTConfig) -> None:
        """Raise ValueError if a size differs from that of the tensors."""
        first = config.hidden * (config.mlp_layers - 1)  # outputs of the first layer
        ratio = self.args.get("mlp_ratio", first / config.width)
        check_sizes(FILE, self.found, {"num_classes": config.classes, "num_features": config.width})
        check_sizes(
            f"{FILE}: model_args",
            {**self.args, **({"init_values": True} if "init_values" in self.args else {})},
            {
                "depth": config.depth,
                "embed_dim": config.width,
                "img_size": config.image_size,
                "in_chans": config.channels,
                "init_values": config.layer_scale,
                "mlp_ratio": ratio if int(config.width * ratio) == first else first / config.width,
                "num_classes": config.classes,
                "patch_size": config.patch_size,
                "qkv_bias": config.qkv_bias,
                "reg_tokens": config.registers,
            },
        )

    def labels(self, classes: int) -> list[str] | None:
        """Return the names of the classes. Raise ValueError if their number is another."""
        names: list[str] | None = self.found.get("label_names", self.pretrained.get("label_names"))
        if not classes or names is None:
            return None
        if len(names) != classes:
            raise ValueError(f"{FILE}: label_names has {len(names)} names for {classes} classes")
        return names

    @property
    def preprocess(self) -> Preprocess | None:
        """Return the preprocessing of evaluation; None if the file has no pretrained_cfg."""
        if "pretrained_cfg" not in self.found:
            return None
        _, size, _ = self.pretrained.get("input_size", (3, IMAGE_SIZE, IMAGE_SIZE))
        return Preprocess(
            image_size=size,
            resize=math.floor(size / self.pretrained.get("crop_pct", CROP_PCT)),
            mean=tuple(self.pretrained.get("mean", IMAGENET_MEAN)),
            std=tuple(self.pretrained.get("std", IMAGENET_STD)),
            resample=Image.Resampling[self.pretrained.get("interpolation", "bicubic").upper()],
            squash=self.pretrained.get("crop_mode") == "squash",
            crop_offset="half-even",
        )


def read_config(content: Mapping[str, Any]) -> Description:
    """Read config.json. Raise ValueError with the field and its value if it is not supported."""
    if "pretrained_cfg" not in content:  # early versions kept its fields beside the architecture
        nested = {k: v for k, v in content.items() if k in _ONLY_PRETRAINED}
        content = {k: v for k, v in content.items() if k not in nested}
        content |= {"pretrained_cfg": nested} if nested else {}
    found = FIELDS.check(FILE, content)
    return Description(
        found,
        MODEL_ARGS.check(f"{FILE}: model_args", found.get("model_args", {})),
        PRETRAINED_CFG.check(f"{FILE}: pretrained_cfg", found.get("pretrained_cfg", {})),
    )


_ONLY_PRETRAINED = (PRETRAINED_CFG.understood.keys() | PRETRAINED_CFG.ignorable) - (
    FIELDS.understood.keys() | FIELDS.ignorable
)


def _parsed(architecture: str) -> re.Match[str]:
    match = _ARCHITECTURE.fullmatch(architecture.partition(".")[0])
    assert match is not None  # checked by FIELDS
    return match
