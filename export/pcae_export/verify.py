"""Parity: compare every graph of a bundle with torch on the same weights and images.

If two patches at a cut differ by less than rounding (a near tie), either may be kept, and both
outputs are right. So each graph is compared twice:

    as served            the graph and torch each choose their patches
    with equal sets      torch is made to keep the patches that the graph kept: arithmetic alone

Limits:

    float32         TOLERANCE both ways (as served: on images without a near tie), and the same
                    patches
    half, int8      the same class as torch on AGREEMENT of the images, as far as the given number
                    of images can show it; features: a mean cosine of at least COSINE
    half            also HALF_TOLERANCE with equal sets; under `merged` only if nothing is
                    dropped, because the patch that a dropped one is merged into is a choice that
                    cannot be made equal
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from pcae_export.cpu_session import GraphError, run_graph
from pcae_export.measure import cosine
from pcae_export.progress import Progress
from pcae_export.torch_reference import Reference, run_torch
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.probabilities import same_answer
from pcae_serve.bundle.reader import Bundle
from pcae_serve.bundle.tokens import Rule
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.errors import PcaeError
from pcae_training.checkpoint import Checkpoint

BATCHES = (1, 2, 3, 8)
TOLERANCE = 1e-3  # difference of a logit; of a feature, relative to the largest one
HALF_TOLERANCE = 0.02  # relative to the largest logit or feature
AGREEMENT = 0.995  # share of images with torch's class, for half and int8 graphs
CONFIDENCE = 0.99  # probability that a graph with exactly AGREEMENT passes
COSINE = 0.99  # mean cosine of features to torch's, for half and int8 graphs. Values up to
# 0.999 occur if half precision keeps or merges other patches; the keep ratio itself costs far more
PATCH_COSINE = 0.95  # mean cosine of patches to torch's, for int8 graphs
MARGIN = 1e-5  # similarity gap of a near tie; float32 rounding is about 1e-6
MIN_IMAGES = 16
MAX_NEAR_TIES = 0.5  # share of the images at a tier, above which parity would prove too little

#: Explains the columns of `Parity.format_table`, in Markdown.
LEGEND = f"""\
- elastic: one graph for all tiers, its token counts are an input. static: one graph per tier, its
  token counts are constant. cuda, tensorrt: static graphs in half precision for GPUs.
- largest difference, mean: of a logit (or feature) to torch's, over the images without a near tie.
- with equal sets: the largest difference, over all images, after torch is made to keep the patches
  that the graph kept, so that only the arithmetic differs.
- near ties: images on which two patches at a cut differ by at most {MARGIN:g} in similarity, so
  that rounding decides which one is kept.
- other patches: images on which the graph keeps other patches than torch."""

Precision = Literal["float32", "int8", "float16", "bfloat16"]


class ParityError(PcaeError):
    """A graph's outputs differ from the model's by more than its precision allows."""


@dataclass(frozen=True)
class ComparedPatches:
    """The patch grids of one graph against torch's; the first two are as in Compared."""

    largest: float
    largest_equal: float
    cosine: float  # mean over all patches, of each to torch's with equal sets


@dataclass(frozen=True)
class Compared:
    """One graph of one tier compared with torch."""

    tier: str
    graph: str  # elastic, static, cuda or tensorrt
    precision: Precision
    images: int
    largest: float  # |difference| of a logit or feature as served, without near ties
    mean: float
    largest_equal: float  # the same with equal sets, over all images
    agreement: float | None  # share of images with torch's class or labels; None without a head
    cosine: float  # mean over images, of the answer to torch's
    near_ties: int  # images
    other_sets: int  # images on which the graph keeps other patches than torch
    patches: ComparedPatches | None = None  # of graphs that return them


@dataclass(frozen=True)
class Parity:
    """All comparisons of one model."""

    images: int
    rows: tuple[Compared, ...]
    not_run: tuple[str, ...] = ()  # graphs that this machine cannot run, and why

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
                text += f", the same class on at least {100 * min(shares):.1f} % of the images"
            else:
                text += f", cosine at least {min(row.cosine for row in rough):.5f}"
        if grids := [row.patches for row in self.rows if row.patches is not None]:
            text += (
                f"; patches of {len(grids)} graphs: cosine at least"
                f" {min(grid.cosine for grid in grids):.5f}"
            )
        return text + "".join(f"; not run: {reason}" for reason in self.not_run)

    def format_table(self) -> Iterator[str]:
        """Yield the rows as lines of a Markdown table. LEGEND explains its columns."""
        features = any(row.agreement is None for row in self.rows)
        alike = "cosine" if features else "same class"
        dense = any(row.patches is not None for row in self.rows)
        heading = " patches: largest difference | with equal sets | cosine |" if dense else ""
        yield (
            "| tier | graph | precision | images | largest difference | mean | with equal sets"
            f" | {alike} | near ties | other patches |{heading}"
        )
        yield "| --- |" + " --- |" * (12 if dense else 9)
        for row in self.rows:
            same = f"{row.cosine:.6f}" if row.agreement is None else f"{100 * row.agreement:.1f} %"
            yield (
                f"| {row.tier} | {row.graph} | {row.precision} | {row.images} | {row.largest:.1e}"
                f" | {row.mean:.1e} | {row.largest_equal:.1e} | {same} | {row.near_ties}"
                f" | {row.other_sets} |" + (_patch_cells(row.patches) if dense else "")
            )


def _patch_cells(grid: ComparedPatches | None) -> str:
    if grid is None:
        return " - | - | - |"
    return f" {grid.largest:.1e} | {grid.largest_equal:.1e} | {grid.cosine:.6f} |"


def verify_model(bundle: Bundle, checkpoint: Checkpoint, pixels: Pixels, model: str) -> Parity:
    """Compare every graph of every tier of `model` with torch.

    pixels uint8 [N, H, W, 3], N >= MIN_IMAGES, run in batches of all sizes in BATCHES.
    checkpoint: the model with its weights as stored in the bundle. Raises ParityError at the first
    graph that exceeds its limits.
    """
    if len(pixels) < MIN_IMAGES:
        raise ParityError(f"parity needs at least {MIN_IMAGES} images, not {len(pixels)}")
    tiers = [tier for tier in bundle.tiers if tier.model == model]
    graphs = [(tier, *graph) for tier in tiers for graph in _graphs(bundle, tier)]
    references: dict[tuple[int, ...], Reference] = {}
    rows, not_run = list[Compared](), dict[str, None]()
    with Progress("verifying", len(graphs), "graphs") as progress:
        for tier, graph, precision, file in graphs:
            if precision == "bfloat16":
                not_run["bfloat16 graphs: ONNX Runtime has no kernels for them on a CPU"] = None
                continue
            counts = tier.token_counts
            if counts not in references:
                dense = bundle.patch_grid is not None
                references[counts] = run_torch(checkpoint, pixels, counts, dense=dense)
            expected, where = references[counts], f"tier {tier.name!r}, {graph} graph"
            if precision == "float32":
                _check_margins(expected, tier.name)
            try:
                found = run_graph(file, pixels, counts if graph == "elastic" else None, BATCHES)
            except GraphError as error:
                raise ParityError(f"{where}: {error}") from None
            row = compare_outputs(found, expected, checkpoint, pixels, tier.name, graph, precision)
            check_parity(row, found, expected, checkpoint.model.config.reduction, where)
            rows.append(row)
            progress.update()
    return Parity(len(pixels), tuple(rows), tuple(not_run))


def _check_margins(expected: Reference, tier: str) -> None:
    """Raise ParityError if too many images are near ties to show anything about parity."""
    images, near = len(expected.margin), int((expected.margin <= MARGIN).sum())
    if near > MAX_NEAR_TIES * images:
        raise ParityError(
            f"tier {tier!r}: {near} of {images} images are near ties, which show nothing about"
            " parity; use other images"
        )


def _graphs(bundle: Bundle, tier: Tier) -> Iterator[tuple[str, Precision, Path]]:
    """Yield kind, precision and file of each of a tier's graphs."""
    half = bundle.manifest.models[tier.model].half
    yield "elastic", tier.precision, bundle.file(tier.model, tier.elastic_graph)
    if tier.precision == "float32":
        yield "static", "float32", bundle.file(tier.model, tier.graph)
        if half is not None:
            yield "cuda", half, bundle.file(tier.model, tier.cuda_graph)
            yield "tensorrt", half, bundle.file(tier.model, tier.tensorrt_graph)


def compare_outputs(
    found: Output,
    expected: Reference,
    checkpoint: Checkpoint,
    pixels: Pixels,
    tier: str,
    graph: str,
    precision: Precision,
) -> Compared:
    """Compare a graph's outputs with torch's.

    Raises ParityError if shapes differ or an output is not finite.
    """
    vectors: NDArray[np.float32] = expected.vectors.numpy()
    shapes = [output.shape for output in (found.vectors, *found.kept)]
    wanted = [tuple(output.shape) for output in (expected.vectors, *expected.kept)]
    if shapes != wanted:
        raise ParityError(f"tier {tier!r}, {graph} graph: output shapes are {shapes}, not {wanted}")
    if not np.isfinite(found.vectors).all():
        raise ParityError(f"tier {tier!r}, {graph} graph: some outputs are not finite")
    if precision in ("float32", "int8"):
        _require_patches(found, expected, f"tier {tier!r}, {graph} graph")
    clear = (expected.margin > MARGIN).numpy()
    other = np.zeros(len(vectors), dtype=bool)
    for kept, reference in zip(found.kept, expected.kept, strict=True):
        other |= (np.sort(kept) != reference.sort(dim=1).values.numpy()).any(axis=1)
    difference = np.abs(found.vectors - vectors)  # [N, classes or D]
    equal = difference.max(axis=1)
    grids = None  # torch's, with equal sets
    if found.patches is not None and expected.patches is not None:
        grids = expected.patches.numpy().copy()
    if other.any():
        forced = run_torch(
            checkpoint, pixels[other], [stage.shape[1] for stage in found.kept],
            [stage[other] for stage in found.kept], dense=grids is not None,
        )  # fmt: skip
        equal[other] = np.abs(found.vectors[other] - forced.vectors.numpy()).max(axis=1)
        if grids is not None and forced.patches is not None:
            grids[other] = forced.patches.numpy()
    comparable = np.ones_like(clear)
    if checkpoint.model.config.reduction == "merged":
        comparable = clear  # the patch that a dropped one is merged into may be a near tie, too
    same = same_answer(found.vectors, vectors, checkpoint.answers)
    return Compared(
        tier=tier,
        graph=graph,
        precision=precision,
        images=len(vectors),
        largest=_largest(difference[clear]),
        mean=float(difference[clear].mean()) if clear.any() else 0.0,
        largest_equal=_largest(equal[comparable]),
        agreement=float(same.mean()) if checkpoint.model.config.classes else None,
        cosine=float(cosine(found.vectors, vectors).mean()),
        near_ties=int((~clear).sum()),
        other_sets=int(other.sum()),
        patches=None
        if grids is None
        else _compare_patches(found, expected, grids, clear, comparable),
    )


def _require_patches(found: Output, expected: Reference, where: str) -> None:
    """Raise ParityError unless a graph returns finite patch grids if the bundle has them."""
    if expected.patches is None:
        return
    shape = None if found.patches is None else found.patches.shape
    if shape != tuple(expected.patches.shape):
        raise ParityError(f"{where}: patches have shape {shape}, not {expected.patches.shape}")
    if not np.isfinite(found.patches).all():  # type: ignore[arg-type]
        raise ParityError(f"{where}: some patches are not finite")


def _compare_patches(
    found: Output,
    expected: Reference,
    equal: NDArray[np.float32],
    clear: NDArray[np.bool_],
    comparable: NDArray[np.bool_],
) -> ComparedPatches:
    """Compare patch grids [N, H, W, D] with torch's, and with torch's for equal sets, `equal`.

    clear: images without a near tie. comparable: those whose sets are equal.
    """
    assert found.patches is not None
    assert expected.patches is not None
    patches, width = found.patches, equal.shape[-1]
    served = np.abs(patches - expected.patches.numpy())
    alike = cosine(patches.reshape(-1, width), equal.reshape(-1, width))
    return ComparedPatches(
        largest=_largest(served[clear]),
        largest_equal=_largest(np.abs(patches - equal)[comparable]),
        cosine=float(alike.mean()),
    )


def _check_patches(row: Compared, expected: Reference, where: str) -> None:
    """Raise ParityError if a graph's patches exceed the limits of its precision."""
    grid = row.patches
    if grid is None or expected.patches is None:
        return
    if row.precision == "float32":
        limit = TOLERANCE * max(1.0, float(expected.patches.abs().max()))
        largest = max(grid.largest, grid.largest_equal)
        if not largest <= limit:
            raise ParityError(
                f"{where}: a patch differs from torch by {largest:.3g}, more than {limit:g}"
            )
    elif not grid.cosine >= PATCH_COSINE:
        raise ParityError(
            f"{where}: {row.precision} patches have a mean cosine of {grid.cosine:.5f} to torch's,"
            f" below {PATCH_COSINE}"
        )


def check_parity(row: Compared, found: Output, expected: Reference, rule: Rule, where: str) -> None:
    """Raise ParityError if a graph exceeds the limits of its precision."""
    largest = float(expected.vectors.abs().max())
    logits = row.agreement is not None
    _check_patches(row, expected, where)
    if row.precision != "float32":
        misses = 0 if row.agreement is None else round((1 - row.agreement) * row.images)
        allowed = int(binom.ppf(CONFIDENCE, row.images, 1 - AGREEMENT))
        if misses > allowed:
            raise ParityError(
                f"{where}: {row.precision} gives another answer than torch on {misses} of"
                f" {row.images} images; at most {allowed} are allowed"
            )
        if not logits and not row.cosine >= COSINE:
            raise ParityError(
                f"{where}: {row.precision} features have a mean cosine of {row.cosine:.5f} to"
                f" torch's, below {COSINE}"
            )
        limit = HALF_TOLERANCE * largest
        comparable = row.precision != "int8" and (
            rule != "merged" or not expected.margin.isfinite().any()
        )
        if comparable and not row.largest_equal <= limit:
            raise ParityError(
                f"{where}: with equal sets it differs from torch by {row.largest_equal:.3g},"
                f" more than {limit:.3g}"
            )
        return
    limit = TOLERANCE if logits else TOLERANCE * max(1.0, largest)
    what = "a logit" if logits else "a feature"
    if not row.largest <= limit:  # negated, so that NaN fails
        raise ParityError(
            f"{where}: {what} differs from torch by {row.largest:.3g}, more than {limit:g}"
        )
    clear = (expected.margin > MARGIN).numpy()
    for stage, (kept, reference) in enumerate(zip(found.kept, expected.kept, strict=True)):
        if not np.array_equal(np.sort(kept)[clear], reference.sort(dim=1).values.numpy()[clear]):
            raise ParityError(f"{where}: keeps other patches than torch after stage {stage}")
    if not row.largest_equal <= limit:
        raise ParityError(
            f"{where}: with equal sets {what} differs from torch by {row.largest_equal:.3g},"
            f" more than {limit:g}"
        )


def _largest(values: NDArray[np.float32]) -> float:
    return float(values.max()) if values.size else 0.0
