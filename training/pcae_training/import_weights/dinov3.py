"""Read config.json of Hugging Face's DINOv3 ViTs.

An absent field has its default in `transformers` 5. Shifts, jitter and scales of the positions are
augmentations, which only training has.
"""

from collections.abc import Mapping
from typing import Any

from pcae_serve.bundle.config_fields import BOOLEAN, POSITIVE, WHOLE, Field, FieldTable, as_json
from pcae_serve.bundle.tokens import Pooling
from pcae_training.import_weights.description import (
    ACTIVATIONS,
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
from pcae_training.import_weights.rename import Renamed
from pcae_training.model import ViTConfig

FAMILIES = {"dinov3_vit": Family(1e-5, ("DINOv3ViTModel",))}
IMAGE_SIZE, HEADS, THETA = 224, 6, 100.0

#: Which layers of a block have a bias, and whether they do by default.
BIASES: Mapping[str, tuple[bool, tuple[str, ...]]] = {
    "query_bias": (True, ("attn.q",)),
    "key_bias": (False, ("attn.k",)),
    "value_bias": (True, ("attn.v",)),
    "proj_bias": (True, ("attn.proj",)),
    "mlp_bias": (True, ("mlp.fc1", "mlp.fc2")),
}

FIELDS = FieldTable(
    understood={
        "model_type": Field.only(*FAMILIES),
        "architectures": one_of(FAMILIES["dinov3_vit"].architectures),
        **SIZES,
        "num_register_tokens": WHOLE,
        "hidden_act": Field.only(*ACTIVATIONS),
        "use_gated_mlp": BOOLEAN,
        "rope_theta": POSITIVE,
        **dict.fromkeys(BIASES, BOOLEAN),
        **ENCODER,
    },
    ignorable=IGNORABLE
    | frozenset(LABELS)  # of a model without a classifier
    | {"attention_dropout", "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"},
)


class DINOv3Description(Description):
    """What config.json says of a DINOv3 ViT."""

    @property
    def heads(self) -> int:
        return int(self.found.get("num_attention_heads", HEADS))

    @property
    def pooling(self) -> Pooling | None:
        return "cls"

    @property
    def stated(self) -> Mapping[str, Any]:
        size = self.found.get("image_size", IMAGE_SIZE)
        return {
            "image_size": size[0] if isinstance(size, list) else size,
            "rope_theta": float(self.found.get("rope_theta", THETA)),
            "activation": ACTIVATIONS[self.found.get("hidden_act", "gelu")],
        }

    def arrange(self, renamed: Renamed) -> Renamed:
        """Check which layers have biases. Raise ValueError if others have."""
        for field, (default, layers) in BIASES.items():
            stated = self.found.get(field, default)
            for layer in layers:
                if stated == (layer in renamed.unbiased):
                    actual = "none" if stated else "some"
                    raise ValueError(
                        f"{FILE}: {field} is {as_json(stated)}, but the weights have {actual}"
                        f" ({layer})"
                    )
        return renamed

    def check(self, config: ViTConfig) -> None:
        """Raise ValueError if a size differs from that of the tensors."""
        super().check(config)
        gated = self.found.get("use_gated_mlp", False)
        sizes = {"num_register_tokens": config.registers, "use_gated_mlp": config.gated_mlp}
        check_sizes(FILE, {"num_register_tokens": 0} | dict(self.found, use_gated_mlp=gated), sizes)


def read_config(content: Mapping[str, Any]) -> Description:
    """Read config.json. Raise ValueError with the field and its value if it is not supported."""
    found = FIELDS.check(FILE, content)
    return DINOv3Description(found, family_of(found, FAMILIES))
