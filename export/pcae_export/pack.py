"""Write a bundle from checkpoints: atomically, after its graphs have been verified and measured."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import onnx
import onnx_ir as ir
import onnxscript
import torch

from pcae_export import card, graph, int8, weights
from pcae_export.calibrate import measure_cascades
from pcae_export.feature_fidelity import FeatureFidelity
from pcae_export.half_precision import Half
from pcae_export.looks_report import LOOKS_IMAGE, draw_looks, format_looks
from pcae_export.measure import Measured
from pcae_export.progress import Progress
from pcae_export.ranking import rank_tiers
from pcae_export.verify import Parity
from pcae_serve import atomic
from pcae_serve.bundle.calibration import Calibration
from pcae_serve.bundle.manifest import (
    ELASTIC_GRAPH,
    INT8_GRAPH,
    MANIFEST,
    WEIGHTS,
    HalfRange,
    Manifest,
    Model,
    Tier,
)
from pcae_serve.bundle.reader import Bundle, file_sha256, load_bundle
from pcae_serve.bundle.tokens import KeepRatio, parse_keep_ratio
from pcae_serve.errors import PcaeError
from pcae_serve.version import __version__
from pcae_training.checkpoint import Checkpoint
from pcae_training.model_config import to_config
from pcae_training.output import check_writable

CARD = "README.md"

#: The PCAE paper's five keep ratios, by tier name.
DEFAULT_TIERS: Mapping[str, KeepRatio] = {
    "fast": 0.6, "brisk": 0.7, "balanced": 0.8, "careful": 0.9, "full": 1.0
}  # fmt: skip


@dataclass(frozen=True)
class TierSpec:
    """A tier to export from a model."""

    keep_ratio: KeepRatio
    precision: Literal["float32", "int8"] = "float32"


DEFAULT: Mapping[str, TierSpec] = {name: TierSpec(ratio) for name, ratio in DEFAULT_TIERS.items()}


@dataclass(frozen=True)
class Part:
    """One of the bundle's models, and its tiers by name."""

    checkpoint: Checkpoint
    tiers: Mapping[str, TierSpec] = field(default_factory=lambda: DEFAULT)
    half: Half | None = None  # precision of the graphs for GPUs; None writes none
    half_range: HalfRange | None = None  # what `half` was chosen by


class PackError(PcaeError):
    """The bundle cannot be written."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a draft; empty for bundles that are only used to measure speed."""

    measured: Mapping[str, Measured] = field(default_factory=dict)  # by tier
    parity: Mapping[str, Parity] = field(default_factory=dict)  # by model
    features: Mapping[str, FeatureFidelity] = field(default_factory=dict)  # by tier, without a head
    calibration: Calibration | None = None


#: Verifies and measures a draft, which lacks only quality and card, and its models with the weights
#: as stored. If it raises, no bundle is written.
Evaluate = Callable[[Bundle, Mapping[str, Checkpoint]], Evaluation]


def write_bundle(
    parts: Mapping[str, Part],
    out: Path,
    *,
    name: str | None = None,
    evaluate: Evaluate = lambda draft, stored: Evaluation(),
    note: str = "",
    pictures: Mapping[str, bytes] = MappingProxyType({}),
    dense: bool = False,
    force: bool = False,
) -> Bundle:
    """Export `parts` (by model id) to a bundle at `out`.

    pictures: files of the card, by name. dense: graphs for CPUs also return patch grids.

    Without `evaluate` nothing is verified or measured, as for benchmarks on random weights. Raises
    PackError if `out` exists (unless it is a bundle and `force` is set), a tier leaves no patch, or
    the parts cannot share a bundle; also what `evaluate` raises. Nothing is left behind then.
    """
    out = out.absolute()
    check_output(out, force)
    planned = plan_tiers(parts)
    if dense:
        check_dense(parts)
    stored = {model_id: _stored(part.checkpoint) for model_id, part in parts.items()}
    with _temporary_folder(out) as fresh:
        for model_id, checkpoint in stored.items():
            folder = fresh / "models" / model_id
            folder.mkdir(parents=True)
            multi_label = checkpoint.multi_label
            config = to_config(checkpoint.model.config, checkpoint.labels, multi_label)
            _write_json(folder / "config.json", config | {"dtype": "float16"})
            _write_json(folder / "preprocessor_config.json", checkpoint.preprocess.to_config())
            weights.write(weights.to_half(checkpoint.model.state_dict()), folder / WEIGHTS)
            tiers = [tier for tier in planned if tier.model == model_id]
            _graphs(name or out.name, checkpoint, tiers, parts[model_id].half, folder, dense)
        (fresh / CARD).write_text("")
        for file, content in pictures.items():
            (fresh / file).write_bytes(content)
        models = {id_: _describe_model(stored[id_], part, dense) for id_, part in parts.items()}
        draft = _seal(fresh, name or out.name, stored, models, planned)
        evaluation = evaluate(draft, stored)
        final = rank_tiers(planned, evaluation.measured)
        looks = _report_looks(fresh, name or out.name, evaluation, final)
        text = card.render(
            draft.manifest, final, stored, evaluation.parity, note, evaluation.features, looks
        )
        (fresh / CARD).write_text(text)
        _seal(fresh, name or out.name, stored, models, final, evaluation.calibration)
        atomic.replace_folder(fresh, out)
    return load_bundle(out)


def _report_looks(root: Path, name: str, evaluation: Evaluation, tiers: list[Tier]) -> str:
    """Draw what second looks reach, and return it as text for the card; empty if unmeasured."""
    calibration, measured = evaluation.calibration, evaluation.measured
    if calibration is None or not calibration.second_looks:
        return ""
    cascades = measure_cascades(measured, tiers, calibration)
    if not cascades:
        return ""
    n = len(measured[tiers[0].name].scores)
    (root / LOOKS_IMAGE).write_bytes(draw_looks(cascades, tiers, name, n))
    return "\n".join(format_looks(cascades, tiers, calibration, n))


def check_output(out: Path, force: bool) -> None:
    """Raise PackError if `out` exists, unless `force` is set and it is a bundle.

    Raises PcaeError if it cannot be written, such as below a file.
    """
    if not os.path.lexists(out):
        check_writable(out)
        return
    if not force:
        raise PackError(f"{out} exists; choose another folder, or replace it with --force")
    if out.is_symlink() or not (out / MANIFEST).is_file():
        raise PackError(f"{out} exists and is not a bundle: --force replaces only bundles")


def check_dense(parts: Mapping[str, Part]) -> None:
    """Raise PackError if the models cannot share a bundle that returns patch grids."""
    grids = set()
    for model_id, part in parts.items():
        config = part.checkpoint.model.config
        if config.classes:
            raise PackError(
                f"model {model_id!r} has a head, and only POST /embed returns patches; drop it with"
                " --features, or omit --dense"
            )
        grids.add((config.grid, config.width))
    if len(grids) > 1:
        raise PackError("--dense needs models whose patch grids have one shape")


def plan_tiers(parts: Mapping[str, Part]) -> list[Tier]:
    """Return the tiers of all parts, the cheapest first, without quality.

    Raises PackError if a tier is impossible, or the models cannot share a bundle.
    """
    checkpoints = {model_id: part.checkpoint for model_id, part in parts.items()}
    _check_together(checkpoints)
    planned = []
    for model_id, part in parts.items():
        config = part.checkpoint.model.config
        for name, wanted in part.tiers.items():
            try:
                counts = config.geometry.counts(wanted.keep_ratio)
            except ValueError as error:
                raise PackError(f"tier {name!r}: {error}") from None
            if not counts and parse_keep_ratio(wanted.keep_ratio) < 1:
                raise PackError(
                    f"tier {name!r}: model {model_id!r} has {config.depth} blocks and no reduction"
                    " points at which to drop patches; give --reduction-points"
                )
            planned.append(
                Tier(
                    name=name,
                    model=model_id,
                    keep_ratio=float(parse_keep_ratio(wanted.keep_ratio)),
                    token_counts=counts,
                    macs=config.geometry.macs(counts),
                    precision=wanted.precision,
                )
            )
    return sorted(planned, key=lambda tier: (tier.macs, tier.precision != "int8"))


def _check_together(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise PackError unless all models have the same input size, preprocessing and labels."""
    (first_id, first), *others = checkpoints.items()
    for checkpoint in checkpoints.values():
        size = checkpoint.preprocess.image_size
        if size != checkpoint.model.config.image_size:
            raise PackError(
                f"the checkpoint's preprocessor makes images of {size} pixels, but its model takes"
                f" {checkpoint.model.config.image_size}"
            )
    for model_id, checkpoint in others:
        both = f"models {first_id!r} and {model_id!r} cannot share a bundle"
        if checkpoint.answers != first.answers:
            raise PackError(f"{both}: one gives {first.answers}, one {checkpoint.answers}")
        if checkpoint.labels != first.labels:
            raise PackError(
                f"{both}: their labels differ ({len(first.labels)} and"
                f" {len(checkpoint.labels)} classes)"
            )
        if not checkpoint.preprocess.same_pixels(first.preprocess):
            raise PackError(f"{both}: their image sizes or resizing differ")
        if not first.labels and checkpoint.model.config.features != first.model.config.features:
            raise PackError(f"{both}: their features have different widths")


def _stored(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its weights rounded to float16, as they are stored."""
    half = weights.to_half(checkpoint.model.state_dict())
    stored = replace(checkpoint, model=deepcopy(checkpoint.model).eval())
    stored.model.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    return stored


def _graphs(
    bundle: str,
    checkpoint: Checkpoint,
    tiers: list[Tier],
    half: Half | None,
    folder: Path,
    dense: bool,
) -> None:
    """Write all graphs of one model: elastic, static, and for GPUs fused and plain ones in half."""
    model, preprocess = checkpoint.model, checkpoint.preprocess
    places = weights.read_places(folder / WEIGHTS)
    exact_tiers = [tier for tier in tiers if tier.precision == "float32"]
    kinds = 3 if half else 1
    total = 2 + kinds * len(exact_tiers) + (len(tiers) > len(exact_tiers))
    progress = Progress("exporting graphs", total, "steps")

    def save(found: ir.Model, file: str, precision: str, tier: Tier | None = None) -> None:
        about = describe_graph(bundle, checkpoint, precision, tier)
        graph.save(graph.bind_weights(found, places), folder / file, about)
        progress.update()

    with progress:
        traced = graph.trace(model, preprocess, dense)
        progress.update()
        elastic = graph.make_elastic(traced)
        save(elastic, ELASTIC_GRAPH, "float32")
        for tier in exact_tiers:
            save(graph.make_static(elastic, tier.token_counts), tier.graph, "float32", tier)
        if len(tiers) > len(exact_tiers):
            about = describe_graph(bundle, checkpoint, "int8", None)
            int8.save(elastic, model.state_dict(), folder / INT8_GRAPH, about)
            progress.update()
        if half is None:
            return
        for fused in (True, False):
            elastic = graph.make_elastic(traced, half, fused)
            for tier in exact_tiers:
                file = tier.cuda_graph if fused else tier.tensorrt_graph
                save(graph.make_static(elastic, tier.token_counts), file, half, tier)


def describe_graph(
    bundle: str, checkpoint: Checkpoint, precision: str, tier: Tier | None
) -> dict[str, str]:
    """Return a graph's metadata, enough to use its file alone. tier: None for an elastic graph."""
    config, preprocess = checkpoint.model.config, checkpoint.preprocess
    entries: dict[str, object] = {
        "name": bundle,
        "producer": f"pcae-serve {__version__}",
        "precision": precision,
        "pixels": "uint8 RGB [batch, height, width, 3], not yet scaled or normalised",
        "image_size": config.image_size,
        "resize": f"{'both sides' if preprocess.squash else 'shorter side'} to {preprocess.resize}",
        "resample": preprocess.resample.name.lower(),
        "mean": preprocess.mean,
        "std": preprocess.std,
        "patch_size": config.patch_size,
        "patches": config.geometry.patches,
        "reduction": config.reduction,
        "reduction_points": config.reduction_points,
        "token_counts": "an input" if tier is None else tier.token_counts,
        "answers": checkpoint.answers,
        "labels": checkpoint.labels,
    }
    if tier is not None:
        entries |= {"tier": tier.name, "keep_ratio": tier.keep_ratio, "macs": tier.macs}
    return {
        f"pcae.{key}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in entries.items()
    }


def _seal(
    root: Path,
    name: str,
    stored: Mapping[str, Checkpoint],
    models: Mapping[str, Model],
    tiers: list[Tier],
    calibration: Calibration | None = None,
) -> Bundle:
    """Write the manifest of all files in `root`, and load the bundle as the server would."""
    files = sorted(file for file in root.rglob("*") if file.is_file() and file != root / MANIFEST)
    first = next(iter(stored.values()))
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).replace(microsecond=0),
        producer={
            "pcae-serve": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "python": platform.python_version(),
        },
        labels=tuple(first.labels),
        models=dict(models),
        tiers=tuple(tiers),
        calibration=calibration,
        files={file.relative_to(root).as_posix(): file_sha256(file) for file in files},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
    return load_bundle(root)


def _describe_model(checkpoint: Checkpoint, part: Part, dense: bool) -> Model:
    config = checkpoint.model.config
    return Model(
        image_size=config.image_size,
        patches=config.geometry.patches,
        patch_size=config.patch_size,
        width=config.width if checkpoint.labels else config.features,
        depth=config.depth,
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        reduction_points=config.reduction_points,
        reduction=config.reduction,
        pooling=config.pooling,
        answers=checkpoint.answers,
        patch_width=config.width if dense else None,
        half=part.half,
        half_range=part.half_range,
    )


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder next to `out`, deleted at the end unless it was renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise PackError(f"cannot write next to {out}: {error.strerror}") from None
    try:
        fresh.chmod(0o755)  # mkdtemp restricts it to the owner
        yield fresh
    except OSError as error:  # such as a full disk
        raise PackError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
