"""Read config.json of Hugging Face's ViT, DeiT, DINOv2 and ViTMAE.

Every field that can change an answer is checked (`pcae_serve.bundle.config_fields`); sizes must be
those of the tensors. An absent field has its default in `transformers` 5.
"""

from collections.abc import Mapping
from typing import Any

from pcae_serve.bundle.config_fields import BOOLEAN, POSITIVE, WHOLE, Field, FieldTable
from pcae_training.import_weights.description import (
    ENCODER,
    FILE,
    IGNORABLE,
    LABELS,
    SIZES,
    Description,
    Family,
    check_sizes,
    family_of,
    one_of,
)
from pcae_training.model import ViTConfig

FAMILIES = {
    "vit": Family(1e-12, ("ViTModel", "ViTForMaskedImageModeling"), ("ViTForImageClassification",)),
    "deit": Family(
        1e-12,
        ("DeiTModel", "DeiTForMaskedImageModeling"),
        ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    ),
    "dinov2": Family(1e-6, ("Dinov2Model",), ("Dinov2ForImageClassification",)),
    "dinov2_with_registers": Family(
        1e-6, ("Dinov2WithRegistersModel",), ("Dinov2WithRegistersForImageClassification",)
    ),
    "vit_mae": Family(1e-12, ("ViTMAEModel", "ViTMAEForPreTraining"), ()),
}

#: Those that may have gated MLPs.
DINOV2 = ("dinov2", "dinov2_with_registers")

FIELDS = FieldTable(
    understood={
        "model_type": Field.only(*FAMILIES),
        "architectures": one_of(
            [name for family in FAMILIES.values() for name in family.architectures]
        ),
        **SIZES,
        "mlp_ratio": POSITIVE,
        "num_register_tokens": WHOLE,
        "hidden_act": Field.only("gelu"),
        "qkv_bias": BOOLEAN,
        "use_swiglu_ffn": BOOLEAN,
        **LABELS,
        **ENCODER,
    },
    ignorable=IGNORABLE,
)


class ViTDescription(Description):
    """What config.json says of a ViT, DeiT, DINOv2 or ViTMAE."""

    @property
    def pooling_known(self) -> bool:
        return bool(self.family.with_head)

    def check(self, config: ViTConfig) -> None:
        """Raise ValueError if a size differs from that of the tensors."""
        super().check(config)
        ratio = self.found.get("mlp_ratio", config.mlp_ratio)
        hidden = int(config.width * ratio)
        if config.gated_mlp:  # two thirds, in multiples of 8
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        sizes = {
            "mlp_ratio": ratio if hidden == config.hidden else config.mlp_ratio,
            "qkv_bias": config.qkv_bias,
        }
        if self.found["model_type"] in DINOV2:
            gated = self.found.get("use_swiglu_ffn", False)
            check_sizes(FILE, {"use_swiglu_ffn": gated}, {"use_swiglu_ffn": config.gated_mlp})
        if self.found["model_type"] == "dinov2_with_registers":
            sizes["num_register_tokens"] = config.registers
        check_sizes(FILE, self.found, sizes)


def read_config(content: Mapping[str, Any]) -> Description:
    """Read config.json. Raise ValueError with the field and its value if it is not supported."""
    found = FIELDS.check(FILE, content)
    return ViTDescription(found, family_of(found, FAMILIES))
