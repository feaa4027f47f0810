"""Parity: what every graph of a bundle answers against what torch answers with the same weights.

TopK is discontinuous: where two patches at a cut are closer than rounding, either may stay, and
both answers are right. Such near ties are counted. So two things are told apart:

    as served            the graph and torch each choose their patches
    with equal sets      torch is made to keep the patches that the graph kept: arithmetic alone

float32 graphs are held to TOLERANCE both ways (as served: wherever nothing is a near tie) and to
the same patches. Half and int8 graphs choose other patches where torch was close: they are held to
the same class on 99.5 % of images (as far as those at hand can tell; features to a cosine of 0.99),
half ones to HALF_TOLERANCE with equal sets. What a dropped patch is merged into is a choice, too,
which cannot be made equal: under `merged` half graphs are held to HALF_TOLERANCE where nothing is
dropped.
It knows a bundle, the network it came from and some images; it needs no labels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pcae_export.measure import cosine
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.bundle.tokens import Rule
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.errors import PcaeError, one_line
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise
from pcae_training.model import Block, VisionTransformer
from pcae_training.reduction import fixed_order, redundancy

BATCHES = (1, 2, 3, 8)
TOLERANCE = 1e-3  # on a logit; on a feature, of the largest one
HALF_TOLERANCE = 0.02  # of the largest logit or feature
AGREEMENT = 0.995  # of the images, for half and int8 graphs
CONFIDENCE = 0.99  # of a graph that agrees just so often, to pass on the few images at hand
COSINE = 0.99  # of features to torch's, their mean, for the same graphs: 0.999 and less is seen
# where half precision keeps or merges other patches, at budgets that cost far more than that
MARGIN = 1e-5  # of similarity at a cut; float32 rounding is some 1e-6
MIN_IMAGES = 16
MAX_NEAR_TIES = 0.5  # of the images at a tier; beyond it the gate would prove too little

Precision = Literal["float32", "int8", "float16", "bfloat16"]


class ParityError(PcaeError):
    """A graph does not answer as the model does."""


@dataclass(frozen=True)
class Reference:
    """What torch answers, and how clearly."""

    vectors: Tensor  # [N, classes] logits, or [N, D] features
    kept: list[Tensor]  # per stage [N, m_i], original indices
    margin: Tensor  # [N], the smallest gap at any choice; infinite where nothing is chosen


@dataclass(frozen=True)
class Compared:
    """One graph of one tier against torch."""

    tier: str
    graph: str  # elastic, static, cuda or tensorrt
    precision: Precision
    images: int
    largest: float  # |difference| of a logit or feature as served, near ties left out
    mean: float
    largest_equal: float  # the same with equal sets, over all images
    agreement: float | None  # share of images with torch's class; None without a head
    cosine: float  # mean over images, of the answer to torch's
    near_ties: int  # images
    other_sets: int  # images of which other patches were kept than torch keeps


@dataclass(frozen=True)
class Parity:
    """Everything compared of one model, and what could not be."""

    images: int
    rows: tuple[Compared, ...]
    not_run: tuple[str, ...] = ()  # graphs that no library here can run, and why

    def __str__(self) -> str:
        exact = [row for row in self.rows if row.precision == "float32"]
        rough = [row for row in self.rows if row.precision != "float32"]
        text = f"{self.images} images, batches of {', '.join(map(str, BATCHES))}"
        if exact:
            ties = sum(row.near_ties for row in exact)
            text += (
                f"; {len(exact)} float32 graphs: largest difference"
                f" {max(row.largest for row in exact):.1e} as served,"
                f" {max(row.largest_equal for row in exact):.1e} with equal sets,"
                f" {ties} near tie{'s' * (ties != 1)}"
            )
        if rough:
            kinds = "/".join(dict.fromkeys(row.precision for row in rough))
            text += (
                f"; {len(rough)} {kinds} graphs: largest difference"
                f" {max(row.largest_equal for row in rough):.1e} with equal sets"
            )
            if shares := [row.agreement for row in rough if row.agreement is not None]:
                text += f", the same class on {100 * min(shares):.1f} % of the images or more"
            else:
                text += f", cosine {min(row.cosine for row in rough):.5f} or more"
        return text + "".join(f"; not run: {reason}" for reason in self.not_run)

    def table(self) -> Iterator[str]:
        """The rows as Markdown."""
        features = any(row.agreement is None for row in self.rows)
        alike = "cosine" if features else "same class"
        yield (
            "| tier | graph | precision | images | largest difference | mean | with equal sets"
            f" | {alike} | near ties | other patches |"
        )
        yield "| --- |" + " --- |" * 9
        for row in self.rows:
            same = f"{row.cosine:.6f}" if row.agreement is None else f"{100 * row.agreement:.1f} %"
            yield (
                f"| {row.tier} | {row.graph} | {row.precision} | {row.images} | {row.largest:.1e}"
                f" | {row.mean:.1e} | {row.largest_equal:.1e} | {same} | {row.near_ties}"
                f" | {row.other_sets} |"
            )


def verify_model(bundle: Bundle, checkpoint: Checkpoint, pixels: Pixels, model: str) -> Parity:
    """Hold every graph of every tier of `model` against torch with its stored weights.

    pixels uint8 [N, H, W, 3], N >= MIN_IMAGES, in batches of all the sizes in BATCHES.
    `checkpoint` holds the stored weights. Raises ParityError at the first graph that is not alike.
    """
    if len(pixels) < MIN_IMAGES:
        raise ParityError(f"parity needs {MIN_IMAGES} images, and there are {len(pixels)}")
    tiers = [tier for tier in bundle.tiers if tier.model == model]
    graphs = [(tier, *graph) for tier in tiers for graph in _graphs(bundle, tier)]
    references: dict[tuple[int, ...], Reference] = {}
    rows, not_run = [], dict[str, None]()
    for tier, graph, precision, file in tqdm(graphs, desc="proving", unit="graph", leave=False):
        counts = tier.token_counts
        if precision == "bfloat16":
            not_run["bfloat16 graphs: ONNX Runtime has no kernels for them on a CPU"] = None
            continue
        if counts not in references:
            references[counts] = run_torch(checkpoint, pixels, counts)
        expected = references[counts]
        near = int((expected.margin <= MARGIN).sum())
        if precision == "float32" and near > MAX_NEAR_TIES * len(pixels):
            raise ParityError(
                f"tier {tier.name!r}: {near} of {len(pixels)} images are near ties, so their"
                " answers prove nothing: give images of another kind"
            )
        where = f"tier {tier.name!r}, {graph} graph"
        found = _run(file, counts if graph == "elastic" else None, pixels, where)
        row = compare(found, expected, checkpoint, pixels, tier.name, graph, precision)
        check_row(row, found, expected, checkpoint.model.config.reduction, where)
        rows.append(row)
    return Parity(len(pixels), tuple(rows), tuple(not_run))


def _graphs(bundle: Bundle, tier: Tier) -> Iterator[tuple[str, Precision, Path]]:
    """Every graph that the bundle holds of a tier: its kind, its precision, its file."""
    half = bundle.manifest.models[tier.model].half
    yield "elastic", tier.precision, bundle.file(tier.model, tier.elastic_graph)
    if tier.precision == "float32":
        yield "static", "float32", bundle.file(tier.model, tier.graph)
        if half is not None:
            yield "cuda", half, bundle.file(tier.model, tier.cuda_graph)
            yield "tensorrt", half, bundle.file(tier.model, tier.tensorrt_graph)


@torch.inference_mode()
def run_torch(
    checkpoint: Checkpoint,
    pixels: Pixels,
    counts: Sequence[int],
    kept: Sequence[NDArray[np.int32]] | None = None,
) -> Reference:
    """Torch's answer to pixels [N, H, W, 3] uint8 at the given token counts.

    kept, per stage [N, m_i]: the patches to keep, whatever torch would choose.
    """
    model, answers = checkpoint.model.eval(), []
    order = fixed_order(model.config.geometry.patches)
    for rows in _rows(len(pixels), 32):
        images = normalise(
            torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2), checkpoint.preprocess
        )
        sets = None if kept is None else [torch.from_numpy(stage[rows]) for stage in kept]
        with _Margins(model, counts) as margins:
            vectors, positions = model.classify(images, counts, noise=order, kept=sets)
        answers.append((vectors, positions, margins.smallest(len(images))))
    stages = zip(*(positions for _, positions, _ in answers), strict=True)
    return Reference(
        vectors=torch.cat([vectors for vectors, _, _ in answers]),
        kept=[torch.cat(stage) for stage in stages],
        margin=torch.cat([margin for _, _, margin in answers]),
    )


class _Margins:
    """While open, notes how near every choice was: between the last patch kept and the first
    dropped, and under `merged` between the two kept ones most like a dropped one."""

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
            before, _, bias = inputs
            patches, sizes = x[:, prefix : prefix + n], None
            if rule == "random":  # whole numbers, never near
                return
            if rule == "attention":
                assert isinstance(block, Block)
                scores = -block.attention_received(before)[:, prefix : prefix + n]
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


def _run(file: Path, counts: Sequence[int] | None, pixels: Pixels, where: str) -> Output:
    """A graph's answers to all pixels, in batches of all sizes in turn."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    feeds: dict[str, Any] = {}
    if counts is not None:
        feeds["token_counts"] = np.array(counts, dtype=np.int64)
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        parts = [
            session.run(None, feeds | {"pixels": pixels[rows]})
            for rows in mixed_batches(len(pixels))
        ]
    except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
        raise ParityError(f"{where}: it does not run: {one_line(error)}") from None
    vectors, *kept = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
    return Output(vectors, tuple(kept))


def compare(
    found: Output,
    expected: Reference,
    checkpoint: Checkpoint,
    pixels: Pixels,
    tier: str,
    graph: str,
    precision: Precision,
) -> Compared:
    """What a graph found against what torch did.

    Raises ParityError where shapes differ, or an answer is no number.
    """
    vectors: NDArray[np.float32] = expected.vectors.numpy()
    shapes = [output.shape for output in (found.vectors, *found.kept)]
    wanted = [tuple(output.shape) for output in (expected.vectors, *expected.kept)]
    if shapes != wanted:
        raise ParityError(f"tier {tier!r}, {graph} graph: answers are {shapes}, not {wanted}")
    if not np.isfinite(found.vectors).all():
        raise ParityError(f"tier {tier!r}, {graph} graph: some answers are no numbers")
    clear = (expected.margin > MARGIN).numpy()
    other = np.zeros(len(vectors), dtype=bool)
    for ours, theirs in zip(found.kept, expected.kept, strict=True):
        other |= (np.sort(ours) != theirs.sort(dim=1).values.numpy()).any(axis=1)
    difference = np.abs(found.vectors - vectors)  # [N, classes or D]
    equal = difference.max(axis=1)
    if other.any():
        forced = run_torch(
            checkpoint, pixels[other], [stage.shape[1] for stage in found.kept],
            [stage[other] for stage in found.kept],
        )  # fmt: skip
        equal[other] = np.abs(found.vectors[other] - forced.vectors.numpy()).max(axis=1)
    if checkpoint.model.config.reduction == "merged":
        equal = equal[clear]  # what a dropped patch merges into may be a near tie, too
    same = found.vectors.argmax(axis=1) == vectors.argmax(axis=1)
    return Compared(
        tier=tier,
        graph=graph,
        precision=precision,
        images=len(vectors),
        largest=_largest(difference[clear]),
        mean=float(difference[clear].mean()) if clear.any() else 0.0,
        largest_equal=_largest(equal),
        agreement=float(same.mean()) if checkpoint.model.config.classes else None,
        cosine=float(cosine(found.vectors, vectors).mean()),
        near_ties=int((~clear).sum()),
        other_sets=int(other.sum()),
    )


def check_row(row: Compared, found: Output, expected: Reference, rule: Rule, where: str) -> None:
    """Raise ParityError unless a graph is alike enough for its precision."""
    largest = float(expected.vectors.abs().max())
    logits = row.agreement is not None
    if row.precision != "float32":
        misses = 0 if row.agreement is None else round((1 - row.agreement) * row.images)
        allowed = int(binom.ppf(CONFIDENCE, row.images, 1 - AGREEMENT))
        if misses > allowed:
            raise ParityError(
                f"{where}: {row.precision} names another class than torch on {misses} of"
                f" {row.images} images: {100 * (1 - AGREEMENT):.1f} % would be {allowed} at most"
            )
        if not logits and not row.cosine >= COSINE:
            raise ParityError(
                f"{where}: {row.precision} features have a cosine of {row.cosine:.5f} to torch's,"
                f" less than {COSINE}"
            )
        limit = HALF_TOLERANCE * largest
        held = row.precision != "int8" and (
            rule != "merged" or not expected.margin.isfinite().any()
        )
        if held and not row.largest_equal <= limit:
            raise ParityError(
                f"{where}: with equal sets it differs from torch by {row.largest_equal:.3g},"
                f" more than {limit:.3g}"
            )
        return
    limit = TOLERANCE if logits else TOLERANCE * max(1.0, largest)
    what = "a logit" if logits else "a feature"
    if not row.largest <= limit:  # so written, not-a-number fails too
        raise ParityError(
            f"{where}: {what} differs from torch by {row.largest:.3g}, over {limit:g}"
        )
    clear = (expected.margin > MARGIN).numpy()
    for stage, (ours, theirs) in enumerate(zip(found.kept, expected.kept, strict=True)):
        if not np.array_equal(np.sort(ours)[clear], theirs.sort(dim=1).values.numpy()[clear]):
            raise ParityError(f"{where}: other patches are kept after stage {stage} than in torch")
    if not row.largest_equal <= limit:
        raise ParityError(
            f"{where}: with equal sets {what} differs from torch by {row.largest_equal:.3g},"
            f" over {limit:g}"
        )


def _largest(values: NDArray[np.float32]) -> float:
    return float(values.max()) if values.size else 0.0


def mixed_batches(count: int) -> Iterator[slice]:
    """All of `count` rows, in batches of every size in BATCHES in turn."""
    start, turn = 0, 0
    while start < count:
        size = BATCHES[turn % len(BATCHES)]
        yield slice(start, min(start + size, count))
        start, turn = start + size, turn + 1


def _rows(count: int, batch: int) -> Iterator[slice]:
    for start in range(0, count, batch):
        yield slice(start, min(start + batch, count))
