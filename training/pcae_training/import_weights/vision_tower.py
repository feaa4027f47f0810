"""Read config.json of the vision tower of Hugging Face's CLIP, alone or in a model of two towers.

The text tower's fields are not read. An absent field has its default in `transformers` 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcae_serve.bundle.config_fields import COUNT, Field, FieldTable
from pcae_training.import_weights.description import (
    ENCODER,
    FILE,
    IGNORABLE,
    LABELS,
    SIZES,
    Description,
    Family,
    check_sizes,
    one_of,
)
from pcae_training.import_weights.rename import Renamed
from pcae_training.mlp import Activation
from pcae_training.model import ViTConfig

#: Models of two towers, whose configuration has that of the vision tower.
PAIRS = {"clip": Family(1e-5, ("CLIPModel",))}
#: Vision towers alone.
TOWERS = {"clip_vision_model": Family(1e-5, ("CLIPVisionModel", "CLIPVisionModelWithProjection"))}

#: Our name of each activation, and the default of each model_type.
ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": "quick-gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu-tanh",
}
DEFAULT_ACTIVATION = "quick_gelu"

_OBJECT = Field("an object", lambda value: isinstance(value, dict))
_OTHER = IGNORABLE | frozenset(LABELS) | {"initializer_factor", "attention_dropout", "dropout"}

PAIR_FIELDS = FieldTable(
    understood={
        "model_type": Field.only(*PAIRS),
        "architectures": one_of([name for family in PAIRS.values() for name in family[1]]),
        "vision_config": _OBJECT,
        "vision_config_dict": _OBJECT,
        "projection_dim": COUNT,
        **ENCODER,
    },
    ignorable=_OTHER | {"logit_scale_init_value", "text_config", "text_config_dict"},
)
TOWER_FIELDS = FieldTable(
    understood={
        "model_type": Field.only(*TOWERS),
        "architectures": one_of([name for family in TOWERS.values() for name in family[1]]),
        **SIZES,
        "hidden_act": Field.only(*ACTIVATIONS),
        "projection_dim": COUNT,
        **ENCODER,
    },
    ignorable=_OTHER,
)


@dataclass(frozen=True)
class TowerDescription(Description):
    """What config.json says of a vision tower."""

    tower: Mapping[str, Any]  # the understood fields of the tower

    @property
    def sizes(self) -> Mapping[str, Any]:
        return self.tower

    @property
    def stated(self) -> Mapping[str, Any]:
        return {"activation": ACTIVATIONS[self.tower.get("hidden_act", DEFAULT_ACTIVATION)]}

    def arrange(self, renamed: Renamed) -> Renamed:
        """Check that the projection is there, or leave it out, as the model's class has it."""
        projects = self.architecture != "CLIPVisionModel"
        if self.architecture is None and self.found["model_type"] in TOWERS:
            return renamed  # either class
        name = "projection.weight"
        if projects and name not in renamed.weights:
            raise ValueError(f"visual_projection.weight is missing, which {FILE} asks for")
        if projects or name not in renamed.weights:
            return renamed
        weights = {key: tensor for key, tensor in renamed.weights.items() if key != name}
        ignored = [*renamed.ignored, "visual_projection.weight"]
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
        return TowerDescription(found, TOWERS[found["model_type"]], found)
    found = PAIR_FIELDS.check(FILE, content)
    # as in `transformers`, which keeps reading the second for old files
    name = "vision_config_dict" if "vision_config_dict" in found else "vision_config"
    tower = TOWER_FIELDS.check(f"{FILE}: {name}", found.get(name, {}))
    return TowerDescription(found, PAIRS[found["model_type"]], tower)
