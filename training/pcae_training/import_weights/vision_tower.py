"""Read config.json of the vision towers of Hugging Face's CLIP and SigLIP.

A tower may be alone or have a text tower, whose fields are not read. An absent field has its
default in `transformers` 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcae_serve.bundle.config_fields import COUNT, Field, FieldTable, as_json
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

#: Models of two towers, whose configuration has that of the vision tower.
PAIRS = {
    "clip": Family(1e-5, ("CLIPModel",)),
    "siglip": Family(1e-6, ("SiglipModel",), ("SiglipForImageClassification",)),
}
#: Vision towers alone.
TOWERS = {
    "clip_vision_model": Family(1e-5, ("CLIPVisionModel", "CLIPVisionModelWithProjection")),
    "siglip_vision_model": Family(1e-6, ("SiglipVisionModel",)),
}
TOWER_OF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

#: The default activation of each tower.
DEFAULT_ACTIVATION = {
    "clip_vision_model": "quick_gelu",
    "siglip_vision_model": "gelu_pytorch_tanh",
}

_FILE_NAMES = {"projection": "visual_projection", "attn_pool": "vision_model.head"}
_OBJECT = Field("an object", lambda value: isinstance(value, dict))
_OTHER = IGNORABLE | {"initializer_factor", "attention_dropout", "dropout"}

PAIR_FIELDS = FieldTable(
    understood={
        "model_type": Field.only(*PAIRS),
        "architectures": one_of(
            [name for family in PAIRS.values() for name in family.architectures]
        ),
        "vision_config": _OBJECT,
        "vision_config_dict": _OBJECT,
        "projection_dim": COUNT,
        **LABELS,
        **ENCODER,
    },
    ignorable=_OTHER | {"logit_scale_init_value", "text_config", "text_config_dict"},
)
TOWER_FIELDS = FieldTable(
    understood={
        "model_type": Field.only(*TOWERS),
        "architectures": one_of(
            [name for family in TOWERS.values() for name in family.architectures]
        ),
        **SIZES,
        "hidden_act": Field.only(*ACTIVATIONS),
        "projection_dim": COUNT,
        "vision_use_head": Field.only(True),
        **ENCODER,
    },
    ignorable=_OTHER | frozenset(LABELS),  # of a tower without a classifier
)


@dataclass(frozen=True)
class TowerDescription(Description):
    """What config.json says of a vision tower."""

    tower: Mapping[str, Any]  # the understood fields of the tower

    @property
    def sizes(self) -> Mapping[str, Any]:
        return self.tower

    @property
    def kind(self) -> str:
        """Return the model_type of the tower."""
        kind: str = self.found["model_type"]
        return TOWER_OF.get(kind, kind)

    @property
    def pooling(self) -> Pooling | None:
        return "normed-mean" if self.has_head else None

    @property
    def stated(self) -> Mapping[str, Any]:
        default = DEFAULT_ACTIVATION[self.kind]
        return {"activation": ACTIVATIONS[self.tower.get("hidden_act", default)]}

    @property
    def parts(self) -> Mapping[str, bool]:
        """Return which parts after the encoder the model's class has, if it is stated."""
        if self.kind == "siglip_vision_model":
            return {"attn_pool": not self.has_head}
        if self.architecture is None and self.found["model_type"] in TOWERS:
            return {}  # with or without a projection
        return {"projection": self.architecture != "CLIPVisionModel"}

    def arrange(self, renamed: Renamed) -> Renamed:
        """Check that parts of the model's class are there, and leave out those of other classes."""
        weights, ignored = dict(renamed.weights), list(renamed.ignored)
        for part, wanted in self.parts.items():
            names = [name for name in weights if name.startswith(f"{part}.")]
            if wanted and not names:
                raise ValueError(f"{_FILE_NAMES[part]} is missing, which {FILE} asks for")
            if names and not wanted:
                ignored.append(_FILE_NAMES[part])
                weights = {name: tensor for name, tensor in weights.items() if name not in names}
        return renamed._replace(weights=weights, ignored=ignored)

    def check(self, config: ViTConfig) -> None:
        """Raise ValueError if a size differs from that of the tensors."""
        super().check(config)
        if config.projection:
            check_sizes(FILE, self.found, {"projection_dim": config.projection})


def read_config(content: Mapping[str, Any]) -> Description:
    """Read config.json. Raise ValueError with the field and its value if it is not supported."""
    if content.get("model_type") in TOWERS:
        found = TOWER_FIELDS.check(FILE, content)
        return TowerDescription(found, family_of(found, TOWERS), found)
    found = PAIR_FIELDS.check(FILE, content)
    # as in `transformers`, which keeps reading the second for old files
    name = "vision_config_dict" if "vision_config_dict" in found else "vision_config"
    tower = TOWER_FIELDS.check(f"{FILE}: {name}", found.get(name, {}))
    kind = found["model_type"]
    if tower.get("model_type", TOWER_OF[kind]) != TOWER_OF[kind]:
        raise ValueError(
            f"{FILE}: {name}: model_type is {as_json(tower['model_type'])}, which is not a tower of"
            f" {kind!r}"
        )
    return TowerDescription(found, family_of(found, PAIRS), tower)
