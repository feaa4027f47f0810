"""Rename and rearrange the tensors of other projects to the names and shapes of our model."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pcae_training.import_weights.architectures import check_architecture
from pcae_training.import_weights.detect import Naming, detect_naming
from pcae_training.import_weights.names import GATED, SCHEMES, Scheme
from pcae_training.import_weights.sizes import require_tensor

#: Weights of a classifier, as opposed to heads that only pretraining uses.
_CLASSIFIER = re.compile(
    r"(?:^|\.)(?:heads?|fc|linear|linear_head|classifier|\w+_classifier|cls_head)"
    r"\.(?:\d+\.|head\.|dense\.|out_proj\.)*weight"
)

#: Tensors that no prediction of the encoder depends on.
_IGNORED = re.compile(r"mask_token$|position_ids$|decoder_|decoder\.|pooler\.|(?:dino|ibot)_head\.")

#: The other tower of a model of images and text, and what compares the two.
_TEXT = re.compile(r"(text_model|text_projection|logit_scale|logit_bias)(?:\.|$)")


#: Weights of the linear layers of a block.
_LINEAR = re.compile(r"blocks\.\d+\.((?:attn|mlp)\.\w+)\.weight")


class Renamed(NamedTuple):
    """A state dict under our names."""

    weights: dict[str, Tensor]  # float32
    ignored: list[str]  # names, as in the file, of tensors that were left out; a text tower's once
    antialias: bool  # see `LoadedCheckpoint`
    unfit_head: str | None  # name and shape of a classifier among them
    scheme: Scheme  # of the names in the file
    gated: bool = False  # its MLPs are gated by SiLU (SwiGLU), unless config.json states otherwise
    unbiased: frozenset[str] = frozenset()  # layers of DINOv3's blocks whose biases are zeros here


def rename_weights(tensors: Mapping[str, Tensor]) -> Renamed:
    """Return the encoder and its head under our names, in float32.

    Raise ValueError if the tensors are not those of a supported ViT.
    """
    check_architecture(tensors)
    naming = detect_naming(tensors)
    weights: dict[str, Tensor] = {}
    original: dict[str, str] = {}  # our name to the file's
    ignored = []
    for name, tensor in tensors.items():
        new_name = _rename(name, naming)
        if text := _TEXT.match(name):
            ignored += [text[1]] * (text[1] not in ignored)
        elif new_name is None:
            ignored.append(name)
        elif new_name in original:
            raise ValueError(
                f"{original[new_name]} and {name} are tensors of one layer, {new_name}"
            )
        else:
            weights[new_name], original[new_name] = tensor.float(), name
    removed = [original[head] for head in _remove_unfit_head(weights, naming)]
    ignored += removed
    unfit = [name for name in ignored if name in removed or _CLASSIFIER.fullmatch(name)]
    unfit_head = f"{unfit[0]} {list(tensors[unfit[0]].shape)}" if unfit else None
    antialias = "reg_token" in weights  # DINOv2 with registers does, the other families do not
    gated = any(GATED.search(name) for name in tensors)
    unbiased: frozenset[str] = frozenset()
    if naming.scheme == "clip":
        weights = _complete(weights)
    elif naming.scheme == "dinov3":
        weights = {name: tensor for name, tensor in weights.items() if tensor.numel()}
        weights, unbiased = _fill_biases(weights)
    weights = _fuse_gates(_fuse_qkv(weights))
    if "pos_embed" in weights:  # else they are rotary, or `infer_config` refuses the model
        weights = _pad_prefix_positions(weights)
        weights = _fold_unread_distillation_token(weights)
    return Renamed(weights, ignored, antialias, unfit_head, naming.scheme, gated, unbiased)


def _rename(name: str, naming: Naming) -> str | None:
    """Return our name, or None to ignore the tensor. Raise ValueError if it is not supported."""
    names = SCHEMES[naming.scheme]
    if not name.startswith(naming.prefix):  # outside of the encoder
        module, _, kind = name.rpartition(".")
        kept = names.outside.get(module)
        return f"{kept}.{kind}" if kept else None
    inner = names.rename(name.removeprefix(naming.prefix))
    return None if _IGNORED.match(inner) else inner


def _complete(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give CLIP's embeddings the dimensions of ours, and its patches a bias of zero."""
    width = require_tensor(weights, "patch_embed.proj.weight", 4).shape[0]
    complete = {"patch_embed.proj.bias": torch.zeros(width)} | weights
    complete["pos_embed"] = require_tensor(weights, "pos_embed", 2)[None]
    if "cls_token" in weights:
        complete["cls_token"] = require_tensor(weights, "cls_token", 1)[None, None]
    for kind in ("weight", "bias"):  # of the pool, whose query is not a token
        if (fused := complete.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            complete[f"attn_pool.q.{kind}"] = fused[:width]
            complete[f"attn_pool.kv.{kind}"] = fused[width:]
    return complete


def _remove_unfit_head(weights: dict[str, Tensor], naming: Naming) -> list[str]:
    """Remove a head that does not read the pooled token, in place. Return the names removed.

    The heads of DINOv2's classifiers (Hugging Face's, and its own) stay: they read the CLS token
    and the mean patch, twice the width.
    """
    width = require_tensor(weights, "patch_embed.proj.weight", 4).shape[0]
    head = weights.get("head.weight")
    inputs = None if head is None else head.shape[1:]
    dinov2 = naming.scheme == "hugging-face" or (naming.scheme == "timm" and naming.prefix)
    if inputs is None or inputs == (width,) or (dinov2 and inputs == (2 * width,)):
        return []
    return [name for name in ("head.weight", "head.bias") if weights.pop(name, None) is not None]


def _fuse_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate separate queries, keys and values [D, D] to one qkv [3 D, D]; biases too."""
    fused = dict(weights)
    for query in (name for name in weights if ".attn.q." in name):
        parts = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        shapes = {weights[part].shape if part in weights else None for part in parts}
        if shapes == {weights[query].shape}:
            fused_name = query.replace(".attn.q.", ".attn.qkv.")
            fused[fused_name] = torch.cat([fused.pop(part) for part in parts])
    return fused


def _fuse_gates(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate gate and first layer [H, D] of gated MLPs to one [2 H, D]; biases too."""
    fused = dict(weights)
    for gate in (name for name in weights if ".mlp.gate." in name):
        first = gate.replace(".mlp.gate.", ".mlp.fc1.")
        if first in weights and weights[first].shape == weights[gate].shape:
            fused[first] = torch.cat([fused.pop(gate), weights[first]])
    return fused


def _fill_biases(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Give layers of blocks that have no bias one of zeros. Return the names of such layers too.

    Raise ValueError if only some blocks have one.
    """
    having: dict[str, set[bool]] = {}
    filled = dict(weights)
    for name, tensor in weights.items():
        match = _LINEAR.fullmatch(name)
        if match is None:
            continue
        bias = f"{name.removesuffix('.weight')}.bias"
        having.setdefault(match[1], set()).add(bias in weights)
        filled.setdefault(bias, torch.zeros(len(tensor)))
    if mixed := next((layer for layer, found in having.items() if len(found) > 1), None):
        raise ValueError(f"some blocks have a bias of {mixed}, and others do not")
    return filled, frozenset(layer for layer, found in having.items() if found == {False})


def _pad_prefix_positions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add zero positions for the prefix if only patches have one (DeiT III, timm's DINOv2)."""
    positions = require_tensor(weights, "pos_embed", 3)  # [1, n, D] or [1, prefix + n, D]
    n = positions.shape[1]
    if math.isqrt(n) ** 2 != n:
        return weights
    prefix = ("cls_token" in weights) + ("dist_token" in weights)
    return weights | {"pos_embed": F.pad(positions, (0, 0, prefix, 0))}


def _fold_unread_distillation_token(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a distillation token that no head reads into a register, its position added to it.

    This keeps the predictions of Hugging Face's DeiTForImageClassification, which classifies the
    CLS token alone.
    """
    if "dist_token" not in weights or "head.weight" not in weights or "head_dist.weight" in weights:
        return weights
    folded = dict(weights)
    positions = folded["pos_embed"]
    folded["reg_token"] = folded.pop("dist_token") + positions[:, 1:2]
    folded["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    return folded
