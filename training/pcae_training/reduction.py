"""Progressive token reduction (PTR): which patches stay after a stage, what becomes of the rest.

    ptr             the paper's: patches least like their mean stay, the mean of the others is
                    appended as one token (equation 3, section 3.4)
    ptr-normalised  the same by the mean of patches scaled to length one, as the public code does
    weighted        ptr, but an appended mean counts as the patches it stands for, in attention (the
                    log of its size is added, as in ToMe) and in pooling
    merged          every dropped patch is averaged into the kept one most like it, which counts as
                    all that it stands for; nothing is appended
    random          ranks drawn at random: the floor
    attention       the most attended stay (appendix E)

The last two append the mean as ptr does. None has parameters. It knows tokens and scores; nothing
of blocks, budgets or where the stages are.
"""

from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bundle.tokens import Rule

RULES: tuple[Rule, ...] = get_args(Rule)


class Tokens(NamedTuple):
    """The tokens between two blocks."""

    x: Tensor  # [B, prefix + n + e, D]: prefix tokens, patches, means of what was dropped
    patches: int  # n
    position: Tensor  # [B, n], int64: which of the image's patches each one is
    prefix: int
    sizes: Tensor | None = None  # float32 [1 or B, n + e]: patches each stands for; None: uncounted

    @property
    def patch_tokens(self) -> Tensor:
        """[B, n, D]"""
        return self.x[:, self.prefix : self.prefix + self.patches]

    @property
    def attention_bias(self) -> Tensor | None:
        """[1 or B, 1, 1, prefix + n + e]: a token of size s is attended to as s equal ones are."""
        if self.sizes is None:
            return None
        return F.pad(self.sizes.log(), (self.prefix, 0))[:, None, None]

    def pooled(self) -> Tensor:
        """The mean over the image's patches: [B, D].

        Without sizes, over those that are left: the appended means are left out (section 3.4).
        """
        if self.sizes is None:
            return self.patch_tokens.mean(dim=1)
        share = self.sizes / self.sizes.sum(dim=1, keepdim=True)
        return (self.x[:, self.prefix :].float() * share[..., None]).sum(dim=1).to(self.x.dtype)


def redundancy(patches: Tensor, normalised: bool = False, sizes: Tensor | None = None) -> Tensor:
    """Cosine of every patch to the mean patch (paper, equation 3): [B, n, D] to float32 [B, n].

    `normalised`: to the mean of the patches scaled to length one, where no patch weighs more.
    `sizes` [B, n]: to the mean in which each counts as so many.
    """
    patches = patches.float()  # near ties flip with precision, so never rank in half
    whole = F.normalize(patches, dim=-1) if normalised else patches
    if sizes is None:
        mean = whole.mean(dim=1, keepdim=True)
    else:
        mean = (whole * (sizes / sizes.sum(dim=1, keepdim=True))[..., None]).sum(1, keepdim=True)
    return F.cosine_similarity(patches, mean, dim=-1)


def reduce_tokens(
    tokens: Tokens,
    keep: int,
    dropped: int | Tensor,
    rule: Rule,
    scores: Tensor | None = None,
    means: int = 1,
) -> Tokens:
    """Keep the `keep` patches of lowest score; `rule` says what becomes of the `dropped` others.

    scores [B, n], the rule's own redundancy where None. `dropped` is n - keep, `means` how many
    tokens their mean is appended as, 1 or 0: the elastic export passes a tensor and a traced size.
    """
    patches, rest = tokens.patch_tokens, tokens.x[:, tokens.prefix + tokens.patches :]
    sizes = tokens.sizes
    if scores is None:
        scores = redundancy(patches, rule == "ptr-normalised", sizes if rule == "merged" else None)
    index = scores.topk(keep, dim=1, largest=False).indices  # [B, m]
    if rule == "merged":
        kept, sizes = _merged(patches, index, sizes)
    else:
        kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        total = patches.float().sum(dim=1) - kept.float().sum(dim=1)  # no second gather
        mean = (total / dropped).to(patches.dtype).unsqueeze(1)  # no number where nothing goes
        rest = torch.cat([rest, mean.narrow(1, 0, means)], dim=1)  # so it is sliced away there
        if rule == "weighted":
            sizes = _appended(tokens, keep, dropped, means)
    x = torch.cat([tokens.x[:, : tokens.prefix], kept, rest], dim=1)
    return Tokens(x, keep, tokens.position.gather(1, index), tokens.prefix, sizes)


def _appended(tokens: Tokens, keep: int, dropped: int | Tensor, means: int) -> Tensor:
    """Sizes [1, m + e] after `keep` patches stay and a mean of `dropped` ones joins the others."""
    device = tokens.x.device
    size = torch.as_tensor(dropped, dtype=torch.float32, device=device).view(1, 1)
    before = [] if tokens.sizes is None else [tokens.sizes[:, tokens.patches :]]
    return torch.cat([torch.ones(1, keep, device=device), *before, size.narrow(1, 0, means)], dim=1)


def _merged(patches: Tensor, index: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Kept patches [B, m, D], each the mean of itself and all merged into it, and sizes [B, m].

    A one-hot product [B, m, n] @ [B, n, D] adds them up: no scatter, which TensorRT lacks.
    """
    batch, n, width = patches.shape
    whole = patches.float()
    unit = F.normalize(whole, dim=-1)
    kept = unit.gather(1, index.unsqueeze(-1).expand(-1, -1, width))
    here = torch.arange(n, device=patches.device)[None, :, None] == index[:, None]  # [B, n, m]
    alike = unit @ kept.transpose(1, 2) + 3 * here  # a kept one goes to itself, even beside a twin
    nearest = alike.argmax(dim=2, keepdim=True)  # [B, n, 1]
    into = (nearest == torch.arange(index.shape[1], device=patches.device)).float()  # [B, n, m]
    size = torch.ones(batch, n, 1, device=patches.device) if sizes is None else sizes[..., None]
    sizes = into.transpose(1, 2) @ size  # [B, m, 1]
    merged = (into.transpose(1, 2) @ (whole * size)) / sizes
    return merged.to(patches.dtype), sizes[..., 0]


def fixed_order(patches: int) -> Tensor:
    """What an exported `random` graph ranks by, the same for every image: float32 [1, patches]."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(patches)
    return torch.from_numpy(order)[None].float()


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """How much the tokens attend to each one, averaged over heads and queries: float32 [B, N].

    q, k [B, heads, N, D / heads]. Without gradient: it only ranks.
    """
    with torch.no_grad():
        weights = (q.float() @ k.float().transpose(-2, -1)) / q.shape[-1] ** 0.5
        received: Tensor = weights.softmax(dim=-1).mean(dim=(1, 2))
        return received
