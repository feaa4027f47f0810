"""Checkpoints of other projects, as weights under our names and the sizes they imply.

    FILE.pth | .pt | .bin | .safetensors   MAE, timm, DeiT, DINO and DINOv2 state dicts
    FOLDER                                 Hugging Face ViT, DeiT, DINOv2, ViTMAE; timm; our own

The sizes come from the tensors' shapes; only what no shape tells (heads, epsilon, labels) comes
from a config.json. A tensor that would change what the encoder computes is never passed over: the
file is refused. It knows nothing of training, nor of which weights are worth starting from.
"""

import argparse
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import REDUCTION_POINTS
from pcae_serve.errors import one_line
from pcae_training import checkpoint
from pcae_training.checkpoint import MODEL_TYPE, CheckpointError
from pcae_training.model import VisionTransformer, ViTConfig

#: Hugging Face's names of the architectures that are a plain ViT.
MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae")

#: What weights are called in a folder, the one to prefer first.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

#: Where training programs keep the state dict, outermost first; DINO's teacher is its model.
WRAPPERS = ("model", "state_dict", "teacher")

#: Widths whose published models do not have 64 channels per head: SO400M, ViT-H, -g and -G.
HEADS_BY_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}

_PATCH_KERNEL = re.compile(
    r"(?P<prefix>(?:.*\.)?)"
    r"(?:patch_embed\.proj|(?P<hugging_face>embeddings\.patch_embeddings\.projection))\.weight"
)

_RENAMES_TIMM = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 in chunks; the second number counts through
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III
    (r"^register_tokens$", "reg_token"),  # DINOv2
)

#: Both of transformers 4, which 5 still writes, and of 5 in memory.
_RENAMES_HUGGING_FACE = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.", ""),  # cls_token, mask_token
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)

#: Hugging Face keeps the heads beside the encoder.
_HEADS_HUGGING_FACE = {
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}

_MEANINGLESS = re.compile(r"mask_token$|decoder_|decoder\.|pooler\.|(?:dino|ibot)_head\.")

#: What may differ between a checkpoint and a model: each is trained in an epoch.
_TOP = re.compile(r"(?:norm|fc_norm|head|head_dist)\.")

_UNSUPPORTED = (
    (r"mlp\.(?:w12|w3|weights_in|weights_out|gate_proj|up_proj|fc1_g)\b", "SwiGLU MLPs"),
    (r"relative_position|rel_pos|attn\.[qv]_bias", "relative positions (BEiT, Swin, SAM)"),
    (r"^layers\.\d+\.(?:blocks|downsample)\.", "stages that merge patches (Swin)"),
    (r"\b[qk]_norm\.", "normalised queries and keys"),
    (r"^norm_pre\.", "a norm before the blocks (CLIP)"),
    (r"^attn_pool\.", "pooling by attention (SigLIP)"),
)


@dataclass
class LoadedCheckpoint:
    """What a checkpoint holds, whoever wrote it."""

    config: ViTConfig  # as the file has it; 0 classes where it has no head that fits
    weights: dict[str, Tensor]  # float32, our names: exactly those of a model of `config`
    labels: list[str] | None = None
    preprocess: Preprocess | None = None  # None: the file does not say
    ignored: list[str] = field(default_factory=list)  # decoder, pooler: by the file's own names
    antialias: bool = False  # how its family makes its position grid smaller
    training: dict[str, Any] = field(default_factory=dict)  # how it came about, where it says so
    ours: bool = False  # so its config says how it is reduced

    def headless(self) -> "LoadedCheckpoint":
        """The same without its head, which has learnt other classes."""
        weights = {name: t for name, t in self.weights.items() if not name.startswith("head")}
        return replace(self, config=replace(self.config, classes=0), weights=weights, labels=None)


@dataclass
class Adapted:
    """Weights for a model that need not be the checkpoint's own."""

    weights: dict[str, Tensor]  # float32
    fresh: list[str]  # of the model, in no checkpoint: they stay as initialised
    dropped: list[str]  # of the checkpoint, with no place in the model


def read(source: Path, *, heads: int | None = None) -> LoadedCheckpoint:
    """Read a state dict, a Hugging Face or timm folder, or a checkpoint of our own.

    heads: of the attention, where only a state dict is there to tell; without it, the one
    published for that width. Pooling is "mean" where the file has an `fc_norm`, else "cls".
    Reduction points are the paper's, or none in a model too shallow for them.
    Raises CheckpointError with one line that names the file and what is wrong with it.
    """
    if source.name in FOLDER_WEIGHTS and (source.parent / "config.json").exists():
        source = source.parent  # what the tensors do not tell lies beside them
    if not source.exists() and source.suffix in FILE_SUFFIXES:
        raise CheckpointError(f"no checkpoint: {source} is missing")
    if source.is_file():
        return _foreign(source, source, {}, heads)
    config_file = source / "config.json"
    if not config_file.exists():
        return _own(source)  # `load` finds what a killed writer left, or says what is missing
    settings = checkpoint.read_json(config_file)
    if settings.get("model_type") == MODEL_TYPE:
        return _own(source)
    return _foreign(source, _weights_file(source), settings, heads)


def adapt(found: LoadedCheckpoint, config: ViTConfig) -> Adapted:
    """Weights of `found` for a model of `config`.

    Positions go to another grid by bicubic interpolation, patch kernels to another size by
    `resize_kernel`. The head stays fresh for another number of classes; head and final
    norm do for another pooling, as they would be fed what they have not learnt.
    Raises CheckpointError where anything else differs, naming the tensor and both shapes.
    """
    if found.config.heads != config.heads:
        raise CheckpointError(
            f"the checkpoint has {found.config.heads} heads, the model {config.heads}"
        )
    repooled = found.config.pooling != config.pooling
    weights, wanted = _resized(found, config), _shapes(config)
    dropped = [
        name
        for name, tensor in weights.items()
        if _TOP.match(name) and (repooled or wanted.get(name) != tensor.shape)
    ]
    weights = {name: tensor for name, tensor in weights.items() if name not in dropped}
    fresh = [name for name in wanted if _TOP.match(name) and name not in weights]
    try:
        _check(weights, {name: shape for name, shape in wanted.items() if name not in fresh})
    except ValueError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {error}") from None
    return Adapted(weights, fresh, dropped)


def initialise(model: VisionTransformer, found: LoadedCheckpoint) -> Adapted:
    """Load what `adapt` gives into `model`, in place; its fresh parameters stay as they are."""
    adapted = adapt(found, model.config)
    model.load_state_dict(adapted.weights, strict=False)  # `adapt` has checked every name
    return adapted


def _own(folder: Path) -> LoadedCheckpoint:
    loaded = checkpoint.load_checkpoint(folder)
    config = loaded.model.config
    return LoadedCheckpoint(
        config,
        loaded.model.state_dict(),
        loaded.labels if config.classes else None,
        loaded.preprocess,
        antialias=config.registers > 0,
        training=loaded.training,
        ours=True,
    )


def _foreign(
    source: Path, file: Path, settings: Mapping[str, Any], heads: int | None
) -> LoadedCheckpoint:
    """The tensors of `file` under our names; `settings` is the config.json, {} without one."""
    try:
        _check_kind(settings)
        weights, ignored, antialias = _translated(_tensors(file))
        config = _config(weights, settings, heads)
        _check(weights, _shapes(config))
        labels = _labels(settings, config.classes)
        preprocess = _preprocess(file.parent, settings)
    except ValueError as error:  # ViTConfig's, too
        raise CheckpointError(f"{source}: {one_line(error)}") from None
    except TypeError as error:  # of a field that is no number
        raise CheckpointError(f"{source}: its config.json is damaged: {one_line(error)}") from None
    return LoadedCheckpoint(config, weights, labels, preprocess, ignored, antialias)


def _check_kind(settings: Mapping[str, Any]) -> None:
    """Refuse a config.json of what is no plain ViT with exact GELUs; {} is a bare state dict."""
    if not settings or "architecture" in settings:  # timm's names it; only the tensors tell more
        return
    kind, activation = settings.get("model_type"), settings.get("hidden_act", "gelu")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"model_type {kind!r} is not supported: only {', '.join(MODEL_TYPES)}, {MODEL_TYPE}"
        )
    if settings.get("use_swiglu_ffn"):
        raise ValueError("SwiGLU MLPs are not supported")
    if activation != "gelu":
        raise ValueError(f"activation {activation!r} is not supported, only exact 'gelu'")


def _weights_file(folder: Path) -> Path:
    for name in FOLDER_WEIGHTS:
        if (folder / name).exists():
            return folder / name
    names = " nor ".join(FOLDER_WEIGHTS)
    raise CheckpointError(f"{folder} holds neither {names}: weights in shards are not read")


def _tensors(file: Path) -> dict[str, Tensor]:
    """The state dict in a file, out of whatever it is wrapped in.

    Nothing in a pickle is run: only tensors, plain values and the `Namespace` of arguments that
    MAE, DeiT and DINO save beside them are rebuilt.
    """
    if file.suffix == ".safetensors":
        return _common_prefix_off(checkpoint.read_tensors(file))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise ValueError("holds more than tensors, or is damaged: save its state dict") from None
    except Exception as error:  # torch's readers raise many kinds on damaged files
        raise ValueError(f"is truncated or no PyTorch file: {one_line(error)}") from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, no state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return _common_prefix_off(tensors)


def _common_prefix_off(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without `module.`, `_orig_mod.` and the like that stand before every name."""
    while tensors and len(first := {name.partition(".")[0] for name in tensors}) == 1:
        start = len(first.pop()) + 1
        if any(len(name) <= start for name in tensors):
            break
        tensors = {name[start:]: tensor for name, tensor in tensors.items()}
    return tensors


def _translated(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], bool]:
    """Weights (float32) under our names, the names of what was left out, and `Found.antialias`."""
    prefix, renames = _naming(tensors)
    weights: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    ignored = []
    for name, tensor in tensors.items():
        ours = _our_name(name, prefix, renames)
        if ours is None:
            ignored.append(name)
        else:
            weights[ours], names[ours] = tensor.float(), name
    ignored += [names[head] for head in _drop_unfit_head(weights)]
    antialias = "reg_token" in weights  # DINOv2 with registers does, all others here do not
    return _without_idle_token(_with_prefix_positions(_fused(weights))), ignored, antialias


def _naming(names: Iterable[str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What stands before the encoder's names, told by its patch kernel, and the renames to ours."""
    kernels = [match for name in names if (match := _PATCH_KERNEL.fullmatch(name))]
    if not kernels:
        raise ValueError("is no vision transformer: it has no patch_embed.proj.weight")
    if len(kernels) > 1:
        found = ", ".join(match[0] for match in kernels)
        raise ValueError(f"holds more than one encoder ({found}): save one of them by itself")
    (kernel,) = kernels
    return kernel["prefix"], _RENAMES_HUGGING_FACE if kernel["hugging_face"] else _RENAMES_TIMM


def _our_name(name: str, prefix: str, renames: tuple[tuple[str, str], ...]) -> str | None:
    """Our name, or None for what means nothing here. Raises ValueError for what is unsupported."""
    if not name.startswith(prefix):  # beside the encoder
        module, _, kind = name.rpartition(".")
        head = _HEADS_HUGGING_FACE.get(module) if renames is _RENAMES_HUGGING_FACE else None
        return f"{head}.{kind}" if head else None
    inner = name.removeprefix(prefix)
    for pattern, what in _UNSUPPORTED:
        if re.search(pattern, inner):
            raise ValueError(f"{what} are not supported: it has {name}")
    for pattern, replacement in renames:
        inner = re.sub(pattern, replacement, inner)
    return None if _MEANINGLESS.match(inner) else inner


def _fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate queries, keys and values [D, D] as one qkv [3 D, D]; the same of their biases."""
    fused = dict(weights)
    for query in (name for name in weights if ".attn.q." in name):
        parts = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        shapes = {weights[part].shape if part in weights else None for part in parts}
        if shapes == {weights[query].shape}:
            whole = query.replace(".attn.q.", ".attn.qkv.")
            fused[whole] = torch.cat([fused.pop(part) for part in parts])
    return fused


def _without_idle_token(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A distillation token that no head reads becomes a register: its position goes into it.

    So Hugging Face's DeiTForImageClassification, which classifies the CLS token alone, keeps
    computing what it did.
    """
    if "dist_token" not in weights or "head.weight" not in weights or "head_dist.weight" in weights:
        return weights
    folded = dict(weights)
    positions = folded["pos_embed"]
    folded["reg_token"] = folded.pop("dist_token") + positions[:, 1:2]
    folded["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    return folded


def _with_prefix_positions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero positions for the prefix where only patches have one (DeiT III, timm's DINOv2)."""
    positions = _need(weights, "pos_embed", 3)  # [1, n, D] or [1, prefix + n, D]
    n = positions.shape[1]
    if math.isqrt(n) ** 2 != n:
        return weights
    return weights | {"pos_embed": F.pad(positions, (0, 0, 1 + ("dist_token" in weights), 0))}


def _drop_unfit_head(weights: dict[str, Tensor]) -> list[str]:
    """Take out a head on more than one pooled token (DINOv2's on CLS and mean); the names taken."""
    width = _need(weights, "patch_embed.proj.weight", 4).shape[0]
    head = weights.get("head.weight")
    if head is None or head.shape[1:] == (width,):
        return []
    return [name for name in ("head.weight", "head.bias") if weights.pop(name, None) is not None]


def _need(weights: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    """A tensor that sizes are read from, so it must be there and have that many dimensions."""
    if name not in weights:
        raise ValueError(f"lacks {name}")
    tensor = weights[name]
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} {list(tensor.shape)} must have {dimensions} dimensions")
    return tensor


def _config(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], heads: int | None
) -> ViTConfig:
    width, channels, patch_size, _ = _need(weights, "patch_embed.proj.weight", 4).shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    distilled = "dist_token" in weights
    patches = _need(weights, "pos_embed", 3).shape[1] - 1 - distilled
    if math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"{patches} patches are no square grid, others are not supported")
    hidden = _need(weights, "blocks.0.mlp.fc1.weight", 2).shape[0]
    return ViTConfig(
        image_size=math.isqrt(patches) * patch_size,
        patch_size=patch_size,
        channels=channels,
        width=width,
        depth=depth,
        heads=heads or settings.get("num_attention_heads") or _usual_heads(width),
        mlp_ratio=hidden / width,
        classes=_need(weights, "head.weight", 2).shape[0] if "head.weight" in weights else 0,
        pooling="mean" if "fc_norm.weight" in weights else "cls",
        norm_eps=settings.get("layer_norm_eps", 1e-6),
        reduction_points=REDUCTION_POINTS if depth > max(REDUCTION_POINTS) else (),
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        layer_scale="blocks.0.ls1.gamma" in weights,
        distilled=distilled,
        registers=_need(weights, "reg_token", 3).shape[1] if "reg_token" in weights else 0,
    )


def _usual_heads(width: int) -> int:
    heads, rest = divmod(width, 64)
    if width in HEADS_BY_WIDTH:
        return HEADS_BY_WIDTH[width]
    if rest:
        raise ValueError(f"no tensor tells how many heads width {width} has: say --heads")
    return heads


def _shapes(config: ViTConfig) -> dict[str, torch.Size]:
    """What a model of `config` holds; nothing is allocated."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError for the first tensor that is missing, of another shape or one too many."""
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"lacks {name} {list(shape)}")
        if weights[name].shape != shape:
            raise ValueError(f"{name} is {list(weights[name].shape)}, not {list(shape)}")
    for name in weights:
        if name not in shapes:
            raise ValueError(f"{name} {list(weights[name].shape)} has no place in such a ViT")


def _labels(settings: Mapping[str, Any], classes: int) -> list[str] | None:
    labels = settings.get("id2label")
    if not classes or not isinstance(labels, dict):
        return None
    if set(labels) != {str(i) for i in range(classes)}:
        raise ValueError(f"config.json names {len(labels)} labels for {classes} classes")
    return [str(labels[str(i)]) for i in range(classes)]


def _preprocess(folder: Path, settings: Mapping[str, Any]) -> Preprocess | None:
    """What Hugging Face's preprocessor_config.json beside the weights says, or timm's config."""
    file = folder / "preprocessor_config.json"
    try:
        if file.exists():
            content = checkpoint.read_json(file)
            if isinstance(size := content.get("size"), int):  # as transformers wrote it once
                content["size"] = {"height": size, "width": size}
            return Preprocess.from_config(content)
        if "pretrained_cfg" in settings:
            return _preprocess_of_timm(settings["pretrained_cfg"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise ValueError(f"its preprocessing cannot be used ({kind}: {one_line(error)})") from None
    return None


def _preprocess_of_timm(settings: Mapping[str, Any]) -> Preprocess:
    if settings.get("crop_mode", "center") != "center":
        raise ValueError(f"crop_mode {settings['crop_mode']!r} is not supported")
    _, size, _ = settings["input_size"]
    return Preprocess(
        image_size=size,
        resize=math.floor(size / settings["crop_pct"]),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        resample=Image.Resampling[settings["interpolation"].upper()],
    )


def _resized(found: LoadedCheckpoint, config: ViTConfig) -> dict[str, Tensor]:
    """All weights of `found`, with patch kernels and positions for the sizes in `config`."""
    weights, old = dict(found.weights), found.config
    if old.patch_size != config.patch_size:
        kernel = "patch_embed.proj.weight"
        weights[kernel] = resize_kernel(weights[kernel], config.patch_size)
    if old.grid != config.grid:
        weights["pos_embed"] = _interpolated(
            weights["pos_embed"], old.positioned, config.grid, found.antialias
        )
    return weights


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """A patch kernel [D, C, p, p] for patches of another size.

    By the pseudo-inverse of bilinear resizing, so that a resized patch gives the token it gave
    before, as nearly as it can (FlexiViT, arXiv 2212.08013, section 3.4).
    """
    old = kernel.shape[-1]
    unit = torch.eye(old * old).view(old * old, 1, old, old)
    smaller = F.interpolate(unit, size=(size, size), mode="bilinear", antialias=False)
    resize = smaller.view(old * old, size * size).T  # [size^2, old^2]: a flat patch to the new size
    resized: Tensor = kernel.float().flatten(2) @ torch.linalg.pinv(resize)  # [D, C, size^2]
    return resized.view(*kernel.shape[:2], size, size)


def _interpolated(positions: Tensor, positioned: int, grid: int, antialias: bool) -> Tensor:
    """Positions [1, positioned + n, D] for grid^2 patches, as each family's own code does it."""
    prefix, patches = positions[:, :positioned], positions[:, positioned:]
    side = math.isqrt(patches.shape[1])
    table = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
    table = F.interpolate(table, size=(grid, grid), mode="bicubic", antialias=antialias)
    return torch.cat([prefix, table.flatten(2).transpose(1, 2)], dim=1)
