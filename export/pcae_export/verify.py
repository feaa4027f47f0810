"""Parity: what the graphs answer against what torch answers with the same stored weights.

It knows a bundle, the network it came from and some real images; it needs no labels. TopK is
discontinuous: where two patches at a cut are closer than rounding, either may stay, and both
answers are right. Such near ties are counted, and held to nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from pcae_serve.bundle import Bundle, Tier
from pcae_serve.engines import Output, Pixels
from pcae_serve.engines.onnx_runtime import OnnxRuntimeEngine
from pcae_serve.errors import PcaeError, one_line
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise
from pcae_training.model import VisionTransformer
from pcae_training.reduction import redundancy

BATCHES = (1, 2, 3, 8)
TOLERANCE = 1e-3  # on a logit
MARGIN = 1e-5  # of similarity at a cut; float32 rounding is some 1e-6
MIN_IMAGES = 64
MAX_NEAR_TIES = 0.5  # of the images at a tier; beyond it the gate would prove too little


class ParityError(PcaeError):
    """A graph does not answer as the model does."""


@dataclass(frozen=True)
class Reference:
    """What torch answers, and how clearly."""

    logits: Tensor  # [N, classes]
    kept: list[Tensor]  # per stage [N, m_i], original indices
    margin: Tensor  # [N], the smallest similarity gap at any cut; infinite where nothing is cut


@dataclass
class Parity:
    """What was compared, and the worst of it; near ties are not in `worst`."""

    images: int
    batches: tuple[int, ...]
    worst: dict[str, float] = field(default_factory=dict)  # tier -> largest |difference| of a logit
    near_ties: dict[str, int] = field(default_factory=dict)  # tier -> images

    def __str__(self) -> str:
        ties = sum(self.near_ties.values())
        return (
            f"{self.images} images, batches {', '.join(map(str, self.batches))},"
            f" {len(self.worst)} tiers, elastic and static: largest logit difference"
            f" {max(self.worst.values()):.1e}, {ties} near tie{'s' * (ties != 1)} of"
            f" {self.images * len(self.worst)}"
        )


def prove(
    bundle: Bundle, checkpoint: Checkpoint, pixels: Pixels, model: str | None = None
) -> Parity:
    """Compare every tier's elastic and static graph with torch, at every batch size in BATCHES.

    pixels uint8 [N, H, W, 3], N >= MIN_IMAGES. `checkpoint` holds the stored weights of `model`,
    whose tiers are compared (None: the bundle has only one).
    Raises ParityError at the first answer that differs by more than TOLERANCE, keeps other patches
    or names another class.
    """
    if len(pixels) < MIN_IMAGES:
        raise ParityError(f"parity needs {MIN_IMAGES} images, and there are {len(pixels)}")
    engine = OnnxRuntimeEngine(bundle)
    parity = Parity(len(pixels), BATCHES)
    tiers = [tier for tier in bundle.tiers if model in (None, tier.model)]
    bar = tqdm(total=len(tiers) * 2 * len(BATCHES), desc="proving", leave=False)
    with bar:
        for tier in tiers:
            expected = reference(checkpoint, pixels, tier.token_counts)
            parity.near_ties[tier.name] = int((expected.margin <= MARGIN).sum())
            if parity.near_ties[tier.name] > MAX_NEAR_TIES * len(pixels):
                raise ParityError(
                    f"tier {tier.name!r}: {parity.near_ties[tier.name]} of {len(pixels)} images are"
                    " near ties, so their answers prove nothing: give images of another kind"
                )
            worst = 0.0
            for graph, run in (("elastic", engine.run), ("static", _static(bundle, tier))):
                for batch in BATCHES:
                    where = f"tier {tier.name!r}, {graph} graph, batch {batch}"
                    for rows in _rows(len(pixels), batch):
                        try:
                            found = run(tier, pixels[rows])
                        except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
                            reason = one_line(error)
                            raise ParityError(f"{where}: it does not run: {reason}") from None
                        worst = max(worst, _compare(found, expected, rows, where))
                    bar.update()
            parity.worst[tier.name] = worst
    return parity


@torch.inference_mode()
def reference(checkpoint: Checkpoint, pixels: Pixels, counts: Sequence[int]) -> Reference:
    """Torch's answer to pixels [N, H, W, 3] uint8 at the given token counts."""
    model, answers = checkpoint.model.eval(), []
    for rows in _rows(len(pixels), 32):
        images = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2)
        with _Margins(model, counts) as margins:
            logits, kept = model.classify(normalise(images, checkpoint.preprocess), counts)
        answers.append((logits, kept, margins.smallest()))
    stages = zip(*(kept for _, kept, _ in answers), strict=True)
    return Reference(
        logits=torch.cat([logits for logits, _, _ in answers]),
        kept=[torch.cat(stage) for stage in stages],
        margin=torch.cat([margin for _, _, margin in answers]),
    )


class _Margins:
    """While open, notes the gap at every cut: between the last patch kept and the first dropped."""

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
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def smallest(self) -> Tensor:
        return torch.stack(self._gaps).amin(0)  # [N]

    def _note(self, n: int, m: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], x: Tensor) -> None:
            if m == n:
                self._gaps.append(torch.full((x.shape[0],), torch.inf))
                return
            ranked = redundancy(x[:, 1 : 1 + n]).sort(dim=1).values  # [N, n]
            self._gaps.append(ranked[:, m] - ranked[:, m - 1])

        return hook


def _static(bundle: Bundle, tier: Tier) -> Callable[[Tier, Pixels], Output]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    file = bundle.file(tier.model, tier.graph)
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = one_line(error)
        raise ParityError(f"ONNX Runtime cannot load {file}: {reason}") from None

    def run(_: Tier, pixels: Pixels) -> Output:
        logits, *kept = session.run(None, {"pixels": pixels})
        return Output(logits, tuple(kept))

    return run


def _compare(found: Output, expected: Reference, rows: slice, where: str) -> float:
    """The largest |difference| of a logit among the clear images. Raises ParityError."""
    logits: NDArray[np.float32] = expected.logits[rows].numpy()
    clear = (expected.margin[rows] > MARGIN).numpy()
    if found.vectors.shape != logits.shape:
        raise ParityError(f"{where}: logits are {found.vectors.shape}, not {logits.shape}")
    difference = np.abs(found.vectors - logits).max(axis=1)[clear]
    if not (difference <= TOLERANCE).all():  # so written, not-a-number fails too
        raise ParityError(
            f"{where}: a logit differs from torch by {difference.max():.3g}, more than {TOLERANCE}"
        )
    changed = (found.vectors.argmax(axis=1) != logits.argmax(axis=1)) & clear
    if changed.any():
        raise ParityError(f"{where}: another class than torch's comes first")
    for stage, (ours, theirs) in enumerate(zip(found.kept, expected.kept, strict=True)):
        if not np.array_equal(np.sort(ours[clear]), theirs[rows].sort(dim=1).values[clear].numpy()):
            raise ParityError(f"{where}: other patches are kept after stage {stage} than in torch")
    return float(difference.max(initial=0.0))


def _rows(count: int, batch: int) -> Iterator[slice]:
    for start in range(0, count, batch):
        yield slice(start, min(start + batch, count))
