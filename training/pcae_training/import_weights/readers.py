"""One reader for each checkpoint format."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pcae_serve.bundle import processor_config
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.processor_config import read_processor
from pcae_serve.bundle.tokens import Pooling
from pcae_training import checkpoint
from pcae_training.checkpoint import read_json
from pcae_training.import_weights import timm
from pcae_training.import_weights.detect import Format, Source
from pcae_training.import_weights.loaded import LoadedCheckpoint
from pcae_training.import_weights.model_types import read_config
from pcae_training.import_weights.rename import Renamed, rename_weights
from pcae_training.import_weights.sizes import check_shapes, infer_config, list_shapes
from pcae_training.import_weights.tensors import WeightsChoice, read_state_dict


class Choices(NamedTuple):
    """What a caller decides where a checkpoint leaves it open."""

    heads: int | None = None
    weights: WeightsChoice | None = None  # None: the averaged ones, if there are two sets


def read_own(source: Source, choices: Choices) -> LoadedCheckpoint:
    """Read a folder written by pcae-train; its config.json states everything."""
    if choices.weights == "ema":
        raise ValueError("contains no averaged weights, which --weights ema asks for")
    stored = checkpoint.load(source.weights)
    config = stored.model.config
    return LoadedCheckpoint(
        config,
        stored.model.state_dict(),
        stored.labels if config.classes else None,
        stored.preprocess,
        antialias=config.registers > 0,
        training=stored.training,
        reduction_known=True,
        pooling_known=config.classes > 0,
        multi_label=stored.multi_label,
    )


def read_hugging_face(source: Source, choices: Choices) -> LoadedCheckpoint:
    """Read a folder of `transformers`. Raise ValueError if a field or tensor is not supported."""
    described = read_config(source.config)
    loaded = _read(
        source,
        choices._replace(heads=choices.heads or described.heads),
        norm_eps=described.norm_eps,
        pooling=described.pooling,
        arrange=described.arrange,
        stated=described.stated,
    )
    described.check(loaded.config)
    loaded.labels = described.labels(loaded.config.classes)
    loaded.multi_label = described.multi_label(loaded.config.classes)
    if described.has_head and not loaded.config.classes and loaded.head_problem is None:
        loaded.head_problem = (
            f"its architecture is {described.architecture}, but its weights have no head; give"
            " --features to use it without"
        )
    loaded.pooling_known = described.pooling_known
    loaded.preprocess = _read_processor(source, source.config["model_type"])
    return loaded


def read_timm(source: Source, choices: Choices) -> LoadedCheckpoint:
    """Read a folder of `timm`. Raise ValueError if a field or tensor is not supported."""
    described = timm.read_config(source.config)
    loaded = _read(
        source,
        choices,
        norm_eps=timm.NORM_EPS,
        pooling=described.pooling,
        arrange=described.arrange,
        heads_of=described.heads,
        stated=described.stated,
    )
    loaded.antialias = True  # of all its models
    described.check(loaded.config)
    loaded.labels = described.labels(loaded.config.classes)
    loaded.multi_label = False if loaded.config.classes != 1 else None
    loaded.preprocess = _read_processor(source) or described.preprocess
    return loaded


def read_bare(source: Source, choices: Choices) -> LoadedCheckpoint:
    """Read a state dict without config.json; the names of Hugging Face's ViT are accepted too."""
    loaded = _read(source, choices, arrange=_check_plain)
    loaded.pooling_known = loaded.config.classes > 0  # MAE and DINO name their tensors alike
    loaded.multi_label = False if loaded.config.classes != 1 else None
    loaded.preprocess = _read_processor(source)
    return loaded


def _check_plain(renamed: Renamed) -> Renamed:
    """Raise ValueError if the tensors alone do not show how the model computes."""
    if renamed.scheme in ("clip", "dinov3"):
        kind = {"clip": "CLIP", "dinov3": "DINOv3"}[renamed.scheme]
        raise ValueError(f"has the tensors of Hugging Face's {kind}, but not its config.json")
    return renamed


READERS: dict[Format, Callable[[Source, Choices], LoadedCheckpoint]] = {
    Format.OWN: read_own,
    Format.HUGGING_FACE: read_hugging_face,
    Format.TIMM: read_timm,
    Format.STATE_DICT: read_bare,
}


def _read(
    source: Source,
    choices: Choices,
    *,
    norm_eps: float = timm.NORM_EPS,
    pooling: Pooling | None = None,
    arrange: Callable[[Renamed], Renamed] = lambda renamed: renamed,
    heads_of: Callable[[int, int | None], int | None] = lambda width, given: given,
    stated: Mapping[str, Any] | None = None,
) -> LoadedCheckpoint:
    """Read the weights, and derive the sizes from them.

    arrange: changes tensors as the configuration asks. heads_of: returns the number of heads for a
    width and what the caller gave; None for the published models'. stated: see `infer_config`.
    """
    state = read_state_dict(source.weights, choices.weights)
    renamed = arrange(rename_weights(state.tensors))
    width = renamed.weights["patch_embed.proj.weight"].shape[0]
    heads = heads_of(width, choices.heads)
    gate: dict[str, Any] = {"gated_mlp": True, "activation": "silu"} if renamed.gated else {}
    sizes = infer_config(renamed.weights, heads, norm_eps, pooling, gate | dict(stated or {}))
    check_shapes(renamed.weights, list_shapes(sizes))
    problem = None
    if renamed.unfit_head is not None and not sizes.classes:
        problem = (
            f"its head {renamed.unfit_head} does not read the pooled token; give --features to use"
            " it without"
        )
    return LoadedCheckpoint(
        sizes,
        renamed.weights,
        ignored=renamed.ignored,
        antialias=renamed.antialias,
        head_problem=problem,
        notes=[*source.notes, *(f"{source.path}: {note}" for note in state.notes)],
    )


def _read_processor(source: Source, model_type: str | None = None) -> Preprocess | None:
    """Read the image processor's configuration next to the weights, if there is one."""
    for folder in source.folders:
        nested, plain = folder / "processor_config.json", folder / processor_config.FILE
        if nested.exists() and isinstance(found := read_json(nested).get("image_processor"), dict):
            return read_processor(found, model_type, nested.name)
        if plain.exists():
            return read_processor(read_json(plain), model_type)
    return None
