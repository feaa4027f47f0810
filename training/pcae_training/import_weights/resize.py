"""Fit a checkpoint's weights to a model of another image size, patch size, head or pooling."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights.loaded import LoadedCheckpoint
from pcae_training.import_weights.sizes import check_shapes, list_shapes
from pcae_training.model import VisionTransformer, ViTConfig

#: The only layers that may differ between checkpoint and model: an epoch is enough to train them.
_TOP = re.compile(r"(?:norm|fc_norm|attn_pool|head|head_dist)\.")


@dataclass
class FittedWeights:
    """A checkpoint's weights in the shapes of a model."""

    weights: dict[str, Tensor]  # float32
    missing: list[str]  # parameters of the model that the checkpoint has no values for
    unused: list[str]  # tensors of the checkpoint that the model has no parameter for


def fit_weights(loaded: LoadedCheckpoint, config: ViTConfig) -> FittedWeights:
    """Return the weights of `loaded` for a model of `config`.

    Positions are interpolated to another grid (bicubic), patch kernels resized by `resize_kernel`.
    The head is left to its initialisation if the number of classes differs; head, final norm and
    pooling by attention are if the pooling differs. Raise CheckpointError, with the tensor's name
    and both shapes, if anything else differs.
    """
    if loaded.config.heads != config.heads:
        raise CheckpointError(
            f"the checkpoint has {loaded.config.heads} heads, the model {config.heads}"
        )
    pooling_differs = loaded.config.pooling != config.pooling
    weights, shapes = _resize(loaded, config), list_shapes(config)
    unused = [
        name
        for name, tensor in weights.items()
        if _TOP.match(name) and (pooling_differs or shapes.get(name) != tensor.shape)
    ]
    weights = {name: tensor for name, tensor in weights.items() if name not in unused}
    missing = [name for name in shapes if _TOP.match(name) and name not in weights]
    try:
        check_shapes(
            weights, {name: shape for name, shape in shapes.items() if name not in missing}
        )
    except ValueError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {error}") from None
    return FittedWeights(weights, missing, unused)


def initialise(model: VisionTransformer, loaded: LoadedCheckpoint) -> FittedWeights:
    """Load the fitted weights of `loaded` into `model`, in place, and return them.

    Parameters in `missing` keep their values.
    """
    fitted = fit_weights(loaded, model.config)
    model.load_state_dict(fitted.weights, strict=False)  # `fit_weights` has checked every name
    return fitted


def _resize(loaded: LoadedCheckpoint, config: ViTConfig) -> dict[str, Tensor]:
    """Return all weights of `loaded`, patch kernel and positions at the sizes of `config`."""
    weights, old = dict(loaded.weights), loaded.config
    if old.patch_size != config.patch_size:
        kernel = "patch_embed.proj.weight"
        weights[kernel] = resize_kernel(weights[kernel], config.patch_size)
    if old.grid != config.grid and not old.rope_theta:
        weights["pos_embed"] = interpolate_positions(
            weights["pos_embed"], old.positioned, config.grid, loaded.antialias
        )
    return weights


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """Resize a patch kernel [D, C, p, p] to [D, C, size, size].

    Multiplies by the pseudo-inverse of bilinear resizing, so that a resized patch gives, as nearly
    as possible, the same token as before (FlexiViT, arXiv 2212.08013, section 3.4).
    """
    old = kernel.shape[-1]
    unit = torch.eye(old * old).view(old * old, 1, old, old)
    smaller = F.interpolate(unit, size=(size, size), mode="bilinear", antialias=False)
    resize = smaller.view(old * old, size * size).T  # [size^2, old^2]: a flat patch to the new size
    resized: Tensor = kernel.float().flatten(2) @ torch.linalg.pinv(resize)  # [D, C, size^2]
    return resized.view(*kernel.shape[:2], size, size)


def interpolate_positions(positions: Tensor, prefix: int, grid: int, antialias: bool) -> Tensor:
    """Interpolate positions [1, prefix + n, D] to [1, prefix + grid^2, D], the prefix unchanged.

    antialias: as the model family's own code does.
    """
    tokens, patches = positions[:, :prefix], positions[:, prefix:]
    side = math.isqrt(patches.shape[1])
    table = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
    table = F.interpolate(table, size=(grid, grid), mode="bicubic", antialias=antialias)
    return torch.cat([tokens, table.flatten(2).transpose(1, 2)], dim=1)
