"""Which reader understands config.json of a model_type of `transformers`."""

from collections.abc import Mapping
from typing import Any

from pcae_serve.bundle.config_fields import as_json
from pcae_training.import_weights import dinov3, hugging_face, vision_tower
from pcae_training.import_weights.architectures import describe_type
from pcae_training.import_weights.description import FILE, Description
from pcae_training.model_config import MODEL_TYPE

READERS = {
    **dict.fromkeys(hugging_face.FAMILIES, hugging_face.read_config),
    **dict.fromkeys(dinov3.FAMILIES, dinov3.read_config),
    **dict.fromkeys((*vision_tower.PAIRS, *vision_tower.TOWERS), vision_tower.read_config),
}


def read_config(content: Mapping[str, Any]) -> Description:
    """Read config.json. Raise ValueError with the field and its value if it is not supported."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        supported = ", ".join((*READERS, MODEL_TYPE))
        known = describe_type(kind) if isinstance(kind, str) else ""
        raise ValueError(f"{FILE}: model_type is {as_json(kind)}{known}; supported: {supported}")
    return READERS[kind](content)
