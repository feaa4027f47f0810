"""Progressive token reduction (PTR): which patches stay after a stage, what is kept of the rest.

It knows patch tokens and scores; nothing of blocks, budgets or where the stages are.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

#: How patches are ranked. `ptr` is the paper's rule (equation 3); `ptr-normalised` compares with
#: the mean of the normalised patches, as the public code does; `random` and `attention` (the most
#: attended stay, appendix E) are what the paper compares it with.
Rule = Literal["ptr", "ptr-normalised", "random", "attention"]
RULES: tuple[Rule, ...] = get_args(Rule)


class Reduced(NamedTuple):
    """What one reduction stage leaves of n patches."""

    kept: Tensor  # [B, m, D], lowest score first
    dropped_mean: Tensor  # [B, 1, D], not a number where nothing was dropped
    indices: Tensor  # [B, m], int64: where in the n patches each kept one stood


def redundancy(patches: Tensor, normalised: bool = False) -> Tensor:
    """Cosine of every patch to the mean patch (paper, equation 3): [B, n, D] to float32 [B, n].

    `normalised`: to the mean of the patches scaled to length one, where no patch weighs more.
    """
    patches = patches.float()  # near ties flip with precision, so never rank in half
    whole = F.normalize(patches, dim=-1) if normalised else patches
    return F.cosine_similarity(patches, whole.mean(dim=1, keepdim=True), dim=-1)


def reduce_patches(
    patches: Tensor, keep: int, dropped: int | Tensor, scores: Tensor | None = None
) -> Reduced:
    """Keep the `keep` patches of lowest score, and average the `dropped` others.

    patches [B, n, D]; scores [B, n], the redundancy where None. `dropped` is n - keep; the elastic
    export passes it as a tensor.
    """
    if scores is None:
        scores = redundancy(patches)
    index = scores.topk(keep, dim=1, largest=False).indices
    kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    mean = (patches.sum(dim=1) - kept.sum(dim=1)) / dropped  # no second gather
    return Reduced(kept, mean.unsqueeze(1), index)


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """How much the tokens attend to each one, averaged over heads and queries: float32 [B, N].

    q, k [B, heads, N, D / heads]. Without gradient: it only ranks.
    """
    with torch.no_grad():
        weights = (q.float() @ k.float().transpose(-2, -1)) / q.shape[-1] ** 0.5
        received: Tensor = weights.softmax(dim=-1).mean(dim=(1, 2))
        return received
