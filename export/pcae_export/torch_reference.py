"""Torch's outputs for given token counts, and how close each of its choices was.

TopK is discontinuous: if two patches at a cut differ by less than rounding, either may be kept, and
both outputs are right. The margin of an image is the smallest such gap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_export.cpu_session import slice_batches
from pcae_serve.bundle.tokens import Rule
from pcae_serve.engines.base import Pixels
from pcae_training.block import Block
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise
from pcae_training.model import VisionTransformer
from pcae_training.reduction import fixed_order, redundancy

BATCH = 32


@dataclass(frozen=True)
class Reference:
    """Torch's outputs for N images."""

    vectors: Tensor  # [N, classes] logits, or [N, D] features
    kept: list[Tensor]  # per stage [N, m_i], original indices
    margin: Tensor  # [N], the smallest gap of any choice; infinite if nothing is dropped
    patches: Tensor | None = None  # [N, H, W, D], if they were asked for


@torch.inference_mode()
def run_torch(
    checkpoint: Checkpoint,
    pixels: Pixels,
    counts: Sequence[int],
    kept: Sequence[NDArray[np.int32]] | None = None,
    dense: bool = False,
) -> Reference:
    """Return torch's outputs for pixels uint8 [N, H, W, 3] at the given token counts.

    kept, per stage [N, m_i]: the patches to keep in place of torch's own choice. dense: with the
    patch grids.
    """
    model, outputs, grids = checkpoint.model.eval(), [], list[Tensor]()
    order = fixed_order(model.config.geometry.patches)
    for rows in slice_batches(len(pixels), (BATCH,)):
        images = normalise(
            torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2), checkpoint.preprocess
        )
        sets = None if kept is None else [torch.from_numpy(stage[rows]) for stage in kept]
        with _Margins(model, counts) as margins:
            if dense:
                vectors, positions, grid = model.classify_densely(
                    images, counts, noise=order, kept=sets
                )
                grids.append(grid)
            else:
                vectors, positions = model.classify(images, counts, noise=order, kept=sets)
        outputs.append((vectors, positions, margins.smallest(len(images))))
    stages = zip(*(positions for _, positions, _ in outputs), strict=True)
    return Reference(
        vectors=torch.cat([vectors for vectors, _, _ in outputs]),
        kept=[torch.cat(stage) for stage in stages],
        margin=torch.cat([margin for _, _, margin in outputs]),
        patches=torch.cat(grids) if dense else None,
    )


class _Margins:
    """Record, while open, the gap of every choice.

    At a cut it lies between the last patch kept and the first one dropped; under `merged` also
    between the two kept patches most similar to a dropped one.
    """

    def __init__(self, model: VisionTransformer, counts: Sequence[int]) -> None:
        self._model, self._gaps = model, list[Tensor]()
        before = (model.config.geometry.patches, *counts)
        self._cuts = dict(
            zip(model.config.reduction_points, zip(before, counts, strict=False), strict=True)
        )

    def __enter__(self) -> "_Margins":
        self._hooks = [
            self._model.blocks[i].register_forward_hook(self._note(n, m))
            for i, (n, m) in self._cuts.items()
            if m < n
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def smallest(self, batch: int) -> Tensor:
        return torch.stack([torch.full((batch,), torch.inf), *self._gaps]).amin(0)  # [N]

    def _note(self, n: int, m: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        rule: Rule = self._model.config.reduction
        prefix = self._model.config.prefix

        def hook(block: nn.Module, inputs: tuple[Any, ...], x: Tensor) -> None:
            before, _, bias, rotation = inputs
            patches, sizes = x[:, prefix : prefix + n], None
            if rule == "random":  # ranks are integers, never close
                return
            if rule == "attention":
                assert isinstance(block, Block)
                scores = -block.attention_received(before, rotation)[:, prefix : prefix + n]
            else:
                if rule == "merged" and bias is not None:
                    sizes = bias[:, 0, 0, prefix:].exp()
                scores = redundancy(patches, rule == "ptr-normalised", sizes)
            ranked = scores.sort(dim=1)
            self._gaps.append(ranked.values[:, m] - ranked.values[:, m - 1])
            if rule == "merged" and m > 1:
                unit = F.normalize(patches.float(), dim=-1)
                ordered = unit.gather(1, ranked.indices[..., None].expand_as(unit))
                alike = ordered[:, m:] @ ordered[:, :m].transpose(1, 2)  # [N, n - m, m]
                first, second = alike.topk(2, dim=2).values.unbind(dim=2)
                self._gaps.append((first - second).amin(dim=1))

        return hook
