"""How different an image's patch tokens are from each other, layer by layer (paper, Figure 3).

It knows token tensors and a model to take them from; nothing of files, labels or charts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pcae_training.model import VisionTransformer


def nuclear_norm_per_token(patches: Tensor) -> Tensor:
    """The sum of A's singular values divided by N, for each image's A: [B, N, D] to float32 [B].

    A is the image's N tokens, each scaled to length one (paper, appendix A). So its Frobenius norm
    is sqrt(N), and the result lies between 1 / sqrt(N), where all tokens point the same way or the
    opposite one, and sqrt(min(N, D) / N), at most 1, where they are as spread as D dimensions
    allow: at N <= D, orthogonal. Both bounds rise as N falls: only part of what fewer tokens gain
    is owed to which tokens they are.
    """
    unit = F.normalize(patches.float(), dim=-1)
    singular_values: Tensor = torch.linalg.svdvals(unit)  # [B, min(N, D)]
    return singular_values.sum(dim=-1) / patches.shape[1]


@torch.inference_mode()
def diversity(
    model: VisionTransformer,
    images: Tensor,
    token_counts: Sequence[int] | None = None,
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """Nuclear norm per token, averaged over normalised images [B, C, H, W]: float32 [depth + 1].

    Entry 0 is of the patch tokens as they enter, with their positions; entry i + 1 of those that
    block i and the stage after it leave. Prefix tokens and means of dropped ones are left out.
    token_counts and noise as in `VisionTransformer.forward`.
    """
    layers = model.walk(model.embed(images), token_counts, noise=noise)
    norms = [nuclear_norm_per_token(tokens.patch_tokens).mean() for tokens in layers]
    return torch.stack(norms)
