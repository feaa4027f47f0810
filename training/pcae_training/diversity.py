"""Measure how different an image's patch tokens are from each other, by layer (paper, Figure 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pcae_training.model import VisionTransformer


def nuclear_norm_per_token(patches: Tensor) -> Tensor:
    """Return the sum of A's singular values divided by N for each image: [B, N, D] to float32 [B].

    A holds the image's N tokens, each scaled to unit length (paper, appendix A), so its Frobenius
    norm is sqrt(N). The result lies between 1 / sqrt(N), if all tokens are parallel or opposite,
    and sqrt(min(N, D) / N), at most 1, if they are as spread as D dimensions allow (orthogonal for
    N <= D). Both bounds rise as N falls, so only part of the gain from fewer tokens is due to their
    selection.
    """
    unit = F.normalize(patches.float(), dim=-1)
    singular_values: Tensor = torch.linalg.svdvals(unit)  # [B, min(N, D)]
    return singular_values.sum(dim=-1) / patches.shape[1]


@torch.inference_mode()
def measure_layers(
    model: VisionTransformer,
    images: Tensor,
    token_counts: Sequence[int] | None = None,
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """Return the nuclear norm per token, averaged over normalised images: float32 [depth + 1].

    images: [B, C, H, W]. Entry 0 is that of the input tokens, with positions; entry i + 1 that of
    the patch tokens after block i and its reduction stage. Prefix tokens and the means of dropped
    patches are excluded. token_counts, noise: see `VisionTransformer.forward`.
    """
    layers = model.walk(model.embed(images), token_counts, noise=noise)
    norms = [nuclear_norm_per_token(tokens.patch_tokens).mean() for tokens in layers]
    return torch.stack(norms)
