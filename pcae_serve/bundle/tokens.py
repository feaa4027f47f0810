"""Token arithmetic: from a keep ratio to patch counts per stage, tokens per block, and MACs.

Integers and exact decimals, used by training, export and server alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import floor
from typing import Literal

KeepRatio = float | str | Decimal | Fraction

#: How patches are ranked and reduced; see `pcae_training.reduction`.
Rule = Literal["ptr", "ptr-normalised", "weighted", "merged", "random", "attention"]

#: What the head reads: the norm of the mean over patches (MAE), the normed CLS token (DeiT), the
#: mean over normed patches, the normed CLS token followed by that mean (DINOv2's classifiers), or a
#: learnt query's attention to normed patches (SigLIP).
Pooling = Literal["mean", "cls", "normed-mean", "cls-mean", "attention"]

#: Blocks, counted from 0, after which a 12-block classifier drops tokens (PCAE paper, section 3.4).
REDUCTION_POINTS = (0, 7, 10)


def reduction_points(depth: int) -> tuple[int, ...]:
    """Return the blocks after which a classifier of `depth` blocks drops tokens, counted from 0.

    They lie at the same relative depths as those of 12 blocks; below 3 blocks there are none.

    >>> reduction_points(24)
    (1, 15, 21)
    """
    if depth < len(REDUCTION_POINTS):
        return ()
    points = [max(0, round(Fraction((i + 1) * depth, 12)) - 1) for i in REDUCTION_POINTS]
    return tuple(dict.fromkeys(points))


def parse_keep_ratio(keep_ratio: KeepRatio) -> Fraction:
    """Parse a keep ratio as the decimal that was written: 0.7 is 7/10, not 0.69999…

    Raises ValueError unless 0 < keep_ratio <= 1.
    """
    try:
        ratio = Fraction(str(keep_ratio))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"keep ratio must be a number in (0, 1], not {keep_ratio!r}") from None
    if not 0 < ratio <= 1:
        raise ValueError(f"keep ratio must be in (0, 1], not {keep_ratio}")
    return ratio


def patches_kept(patches: int, keep_ratio: KeepRatio, stages: int = 3) -> tuple[int, ...]:
    """Return the patches kept after each stage: exactly floor(n * k) of the previous stage's n.

    >>> patches_kept(196, 0.7)
    (137, 95, 66)

    Raises ValueError if a stage would keep no patch.
    """
    ratio, counts = parse_keep_ratio(keep_ratio), []
    for stage in range(stages):
        patches = floor(patches * ratio)
        if patches < 1:
            raise ValueError(f"keep ratio {keep_ratio} leaves no patch after stage {stage}")
        counts.append(patches)
    return tuple(counts)


@dataclass(frozen=True)
class Geometry:
    """The sizes that determine the cost of a plain ViT."""

    patches: int  # per image, before any reduction
    width: int
    depth: int
    patch_values: int  # numbers in one patch: channels * patch_size**2
    classes: int
    prefix_tokens: int = 1  # CLS
    pooled_tokens: int = 1  # vectors of the width that the head reads
    projection: int = 0  # width that they are projected to before; 0: they are not
    attention_pool: bool = False  # the patches are pooled by attention
    mlp_ratio: float = 4.0
    mlp_layers: int = 2  # linear layers of the MLP; 3 if it is gated
    reduction_points: tuple[int, ...] = REDUCTION_POINTS
    reduction: Rule = "ptr"

    def counts(self, keep_ratio: KeepRatio) -> tuple[int, ...]:
        """Return the patches kept after each of this model's stages."""
        return patches_kept(self.patches, keep_ratio, len(self.reduction_points))

    def tokens_per_block(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Return each block's sequence length.

        It counts prefix tokens, kept patches, and one mean for each stage that dropped patches
        (`merged` appends none). Raises ValueError unless `counts` has an entry per stage,
        decreasing from `patches`.
        """
        self.check(counts)
        left, appended, lengths = self.patches, 0, []
        after = dict(zip(self.reduction_points, counts, strict=True))
        for block in range(self.depth):
            lengths.append(self.prefix_tokens + left + appended)
            if block in after:
                appended += after[block] < left and self.reduction != "merged"
                left = after[block]
        return tuple(lengths)

    def macs(self, counts: Sequence[int]) -> int:
        """Return the multiply-adds for one image.

        A block of N tokens and width D costs (4 + l*r)*N*D^2 + 2*N^2*D, where r is the MLP ratio
        and l its layers (12*N*D^2 at r = 4, l = 2). A stage that drops patches adds the matrix
        products of its rule (see `_stage_macs`). Norms, softmax, rotary positions and cosines with
        the mean (below 0.1 %) are left out, as in
        the paper's Table 5.
        """
        d, per_token = self.width, (4 + self.mlp_layers * self.mlp_ratio) * self.width**2
        tokens = self.tokens_per_block(counts)
        blocks = sum(per_token * n + 2 * n * n * d for n in tokens)
        left, stages = self.patches, 0
        for block, kept in zip(self.reduction_points, counts, strict=True):
            if kept < left:
                stages += self._stage_macs(tokens[block], left, kept)
            left = kept
        top = self._pool_macs(counts) + self._head_macs()
        return round(self.patches * self.patch_values * d + blocks + stages + top)

    def _pool_macs(self, counts: Sequence[int]) -> float:
        """Return the multiply-adds of pooling by attention; a mean takes none.

        The query is projected once. It attends to the patches and, if sizes count, to the means.
        """
        if not self.attention_pool:
            return 0
        d, falling = self.width, (self.patches, *counts)
        keys = falling[-1]
        if self.reduction == "weighted":
            keys += sum(b < a for a, b in zip(falling, counts, strict=False))
        return (2 + 2 * keys + 2 * self.mlp_ratio) * d * d + 2 * keys * d

    def _head_macs(self) -> int:
        """Return the multiply-adds of projection and head."""
        read = self.pooled_tokens * self.width
        if not self.projection:
            return read * self.classes
        return read * self.projection + self.projection * self.classes

    def _stage_macs(self, tokens: int, patches: int, kept: int) -> int:
        """Return the multiply-adds of ranking and merging `patches` after a block of `tokens`.

        `attention` computes the queries, keys and values of the block again, and their products.
        `merged` compares all patches with the kept ones, and sums by a one-hot product.
        """
        d = self.width
        if self.reduction == "attention":
            return 3 * tokens * d * d + tokens * tokens * d
        if self.reduction == "merged":
            return 2 * patches * kept * d
        return 0

    def check(self, counts: Sequence[int]) -> None:
        """Raise ValueError unless `counts` are possible patch counts of this model's stages."""
        stages = len(self.reduction_points)
        if len(counts) != stages:
            raise ValueError(f"{len(counts)} token counts for {stages} reduction points")
        falling = (self.patches, *counts)
        if any(b > a or b < 1 for a, b in zip(falling, counts, strict=False)):
            raise ValueError(
                f"token counts must decrease from {self.patches} and stay above 0,"
                f" not {tuple(counts)}"
            )
