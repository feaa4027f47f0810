"""Progressive token reduction (PTR): rules that choose the patches to keep and treat the rest.

    ptr             the paper's: keep the patches least similar to their mean, append the mean of
                    the others as one token (equation 3, section 3.4)
    ptr-normalised  the same with the mean of patches scaled to unit length, as in the public code
    weighted        ptr, but an appended mean counts as the patches that it represents, in attention
                    (the log of its size is added, as in ToMe) and in pooling
    merged          average every dropped patch into the most similar kept one, which counts as all
                    patches that it represents; append nothing
    random          keep random patches: a baseline
    attention       keep the patches that receive most attention (appendix E)

The last two append the mean as ptr does. No rule has parameters.
"""

from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bundle.tokens import Rule
from pcae_training.rotary import Rotation

RULES: tuple[Rule, ...] = get_args(Rule)


class PatchGrid(NamedTuple):
    """Where the state of every patch of an image is found after reductions, dropped ones included.

    Both are None before the first reduction; then the patches are all there, in order.
    """

    states: Tensor | None = None  # [B, P, D]: the last state of each patch that was dropped
    slots: Tensor | None = None  # int64 [B, P], under `merged`: the kept patch that each went into

    def drop(self, patches: Tensor, position: Tensor) -> "PatchGrid":
        """Store the states of patches [B, n, D], before some are dropped. position: [B, n]."""
        if self.states is None:
            return PatchGrid(states=patches)
        return PatchGrid(states=self.states.scatter(1, _per_channel(position, patches), patches))

    def merge(self, nearest: Tensor) -> "PatchGrid":
        """Follow patches into the kept ones. nearest: int64 [B, n], numbers of kept patches."""
        return PatchGrid(slots=nearest if self.slots is None else nearest.gather(1, self.slots))

    def states_of(self, patches: Tensor, position: Tensor) -> Tensor:
        """Return the last state of every patch, [B, P, D]: row by row, as in the image.

        patches [B, n, D], position [B, n]: those that are left. A dropped patch has its own state
        from when it was dropped, a merged one that of the patch it was merged into.
        """
        if self.slots is not None:
            return patches.gather(1, _per_channel(self.slots, patches))
        return self.drop(patches, position).states  # type: ignore[return-value]


def _per_channel(index: Tensor, values: Tensor) -> Tensor:
    """Return an index [B, n] for every channel of values [B, m, D]: [B, n, D]."""
    return index.unsqueeze(-1).expand(-1, -1, values.shape[2])


class Tokens(NamedTuple):
    """The tokens between two blocks."""

    x: Tensor  # [B, prefix + n + e, D]: prefix tokens, patches, means of dropped patches
    patches: int  # n
    position: Tensor  # int64 [B, n]: index of each patch in the image
    prefix: int
    sizes: Tensor | None = None  # float32 [1 or B, n + e]: patches each represents, if counted
    rotation: Rotation | None = None  # of all tokens, if positions are rotary
    grid: PatchGrid | None = None  # of all patches, if their states are wanted

    @property
    def patch_tokens(self) -> Tensor:
        """The patches, [B, n, D]."""
        return self.x[:, self.prefix : self.prefix + self.patches]

    @property
    def attention_bias(self) -> Tensor | None:
        """[1 or B, 1, 1, prefix + n + e]: gives a token of size s the attention of s equal ones."""
        if self.sizes is None:
            return None
        return F.pad(self.sizes.log(), (self.prefix, 0))[:, None, None]

    @property
    def image_tokens(self) -> Tensor:
        """The tokens that stand for the image, [B, K, D]: patches, and means whose size counts."""
        return self.patch_tokens if self.sizes is None else self.x[:, self.prefix :]

    @property
    def image_bias(self) -> Tensor | None:
        """[1 or B, 1, 1, K]: `attention_bias` of the image's tokens."""
        return None if self.sizes is None else self.sizes.log()[:, None, None]

    def pool(self) -> Tensor:
        """Return the mean over the image's patches, [B, D].

        Without sizes it is over the kept patches, without the appended means (section 3.4).
        """
        if self.sizes is None:
            return self.patch_tokens.mean(dim=1)
        share = self.sizes / self.sizes.sum(dim=1, keepdim=True)
        return (self.image_tokens.float() * share[..., None]).sum(dim=1).to(self.x.dtype)


def redundancy(patches: Tensor, normalised: bool = False, sizes: Tensor | None = None) -> Tensor:
    """Return the cosine of every patch with the mean patch (paper, equation 3), float32 [B, n].

    patches: [B, n, D]. normalised: use the mean of the patches scaled to unit length. sizes [B, n]:
    weights of the patches in the mean.
    """
    patches = patches.float()  # near ties depend on precision, so ranks are never computed in half
    values = F.normalize(patches, dim=-1) if normalised else patches
    if sizes is None:
        mean = values.mean(dim=1, keepdim=True)
    else:
        mean = (values * (sizes / sizes.sum(dim=1, keepdim=True))[..., None]).sum(1, keepdim=True)
    return F.cosine_similarity(patches, mean, dim=-1)


def reduce_tokens(
    tokens: Tokens,
    keep: int,
    dropped: int | Tensor,
    rule: Rule,
    scores: Tensor | None = None,
    means: int = 1,
) -> Tokens:
    """Keep the `keep` patches of lowest score, and apply `rule` to the `dropped` others.

    scores: [B, n]; None for the rule's redundancy. dropped: n - keep. means: tokens that the mean
    is appended as, 1 or 0. The elastic export passes a tensor and a traced size for the last two.
    """
    patches, rest = tokens.patch_tokens, tokens.x[:, tokens.prefix + tokens.patches :]
    sizes = tokens.sizes
    if scores is None:
        scores = redundancy(patches, rule == "ptr-normalised", sizes if rule == "merged" else None)
    index = scores.topk(keep, dim=1, largest=False).indices  # [B, m]
    grid = tokens.grid
    if rule == "merged":
        kept, sizes, nearest = _merge(patches, index, sizes)
        grid = None if grid is None else grid.merge(nearest)
    else:
        grid = None if grid is None else grid.drop(patches, tokens.position)
        kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        total = patches.float().sum(dim=1) - kept.float().sum(dim=1)  # no second gather
        mean = (total / dropped).to(patches.dtype).unsqueeze(1)  # NaN if nothing is dropped,
        rest = torch.cat([rest, mean.narrow(1, 0, means)], dim=1)  # where it is sliced away
        if rule == "weighted":
            sizes = _append_size(tokens, keep, dropped, means)
    x = torch.cat([tokens.x[:, : tokens.prefix], kept, rest], dim=1)
    rotation = tokens.rotation
    if rotation is not None:
        appended = 0 if rule == "merged" else means
        rotation = rotation.keep(index, tokens.prefix, tokens.patches, appended)
    position = tokens.position.gather(1, index)
    return Tokens(x, keep, position, tokens.prefix, sizes, rotation, grid)


def _append_size(tokens: Tokens, keep: int, dropped: int | Tensor, means: int) -> Tensor:
    """Return the sizes [1, m + e] of `keep` patches and the means, that of `dropped` ones last."""
    device = tokens.x.device
    size = torch.as_tensor(dropped, dtype=torch.float32, device=device).view(1, 1)
    before = [] if tokens.sizes is None else [tokens.sizes[:, tokens.patches :]]
    return torch.cat([torch.ones(1, keep, device=device), *before, size.narrow(1, 0, means)], dim=1)


def _merge(patches: Tensor, index: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept patches [B, m, D], averaged with those merged into them, and sizes [B, m].

    The third is int64 [B, n]: the number of the kept patch that each patch went into.

    Sums are a one-hot product [B, m, n] @ [B, n, D], because TensorRT has no scatter-add.
    """
    batch, n, width = patches.shape
    values = patches.float()
    unit = F.normalize(values, dim=-1)
    kept = unit.gather(1, index.unsqueeze(-1).expand(-1, -1, width))
    here = torch.arange(n, device=patches.device)[None, :, None] == index[:, None]  # [B, n, m]
    alike = unit @ kept.transpose(1, 2) + 3 * here  # a kept patch goes to itself
    nearest = alike.argmax(dim=2, keepdim=True)  # [B, n, 1]
    into = (nearest == torch.arange(index.shape[1], device=patches.device)).float()  # [B, n, m]
    size = torch.ones(batch, n, 1, device=patches.device) if sizes is None else sizes[..., None]
    sizes = into.transpose(1, 2) @ size  # [B, m, 1]
    merged = (into.transpose(1, 2) @ (values * size)) / sizes
    return merged.to(patches.dtype), sizes[..., 0], nearest[..., 0]


def fixed_order(patches: int) -> Tensor:
    """Return the ranking of an exported `random` graph, the same for all images: [1, patches]."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(patches)
    return torch.from_numpy(order)[None].float()


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention that each token receives, averaged over heads and queries: [B, N].

    q, k: [B, heads, N, D / heads]. Float32 without gradient: it is only used to rank.
    """
    with torch.no_grad():
        weights = (q.float() @ k.float().transpose(-2, -1)) / q.shape[-1] ** 0.5
        received: Tensor = weights.softmax(dim=-1).mean(dim=(1, 2))
        return received
