"""A checkpoint to a sealed bundle (DESIGN section 3), written whole or not at all.

It knows the bundle's files and their order of making; what the graphs are worth it asks a judge.
"""

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

import onnx
import onnxscript
import torch
from tqdm import tqdm

import pcae_serve
from pcae_export import card, graph, weights
from pcae_export.verify import Parity
from pcae_serve import bundle as bundles
from pcae_serve.bundle import (
    ELASTIC_GRAPH,
    MANIFEST,
    WEIGHTS,
    Accuracy,
    Bundle,
    Manifest,
    Model,
    Tier,
)
from pcae_serve.errors import PcaeError
from pcae_serve.tokens import KeepRatio, exact
from pcae_training.checkpoint import Checkpoint, to_config

CARD = "README.md"

#: The paper's five budgets (DESIGN section 3), tier name to keep ratio.
DEFAULT_TIERS: Mapping[str, KeepRatio] = {
    "fast": 0.6, "brisk": 0.7, "balanced": 0.8, "careful": 0.9, "full": 1.0
}  # fmt: skip


class PackError(PcaeError):
    """The bundle cannot be written."""


@dataclass(frozen=True)
class Evidence:
    """What a judge found of a draft; empty for bundles that only measure speed."""

    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)  # by tier
    parity: Parity | None = None


#: Sees the draft, whole but for accuracy and card, and the model with the weights as stored.
#: What it raises keeps the bundle from being written.
Judge = Callable[[Bundle, Checkpoint], Evidence]


def write(
    checkpoint: Checkpoint,
    out: Path,
    tiers: Mapping[str, KeepRatio] = DEFAULT_TIERS,
    *,
    name: str | None = None,
    model_id: str = "vit",
    judge: Judge = lambda draft, stored: Evidence(),
    note: str = "",
    force: bool = False,
) -> Bundle:
    """Export `checkpoint` at the given tiers (name to keep ratio) and put the bundle at `out`.

    Without a judge nothing is measured and no claim is made: for benchmarks on random weights.
    Raises PackError where `out` exists (unless `force`, and it is a bundle) or a tier leaves no
    patch; and whatever the judge raises. Then nothing is left behind.
    """
    out = out.absolute()
    refuse(out, force)
    if checkpoint.preprocess.image_size != checkpoint.model.config.image_size:
        raise PackError(
            f"the checkpoint's preprocessor makes images of {checkpoint.preprocess.image_size}"
            f" pixels, but its model takes {checkpoint.model.config.image_size}"
        )
    planned = plan(checkpoint, tiers, model_id)
    half = weights.to_half(checkpoint.model.state_dict())
    stored = replace(checkpoint, model=deepcopy(checkpoint.model).eval())
    stored.model.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    with _beside(out) as fresh:
        folder = fresh / "models" / model_id
        folder.mkdir(parents=True)
        config = to_config(stored.model.config, stored.labels) | {"dtype": "float16"}
        _write_json(folder / "config.json", config)
        _write_json(folder / "preprocessor_config.json", stored.preprocess.to_config())
        weights.write(half, folder / WEIGHTS)
        _graphs(stored, planned, folder)
        (fresh / CARD).write_text("")
        draft = _seal(fresh, name or out.name, stored, model_id, planned)
        evidence = judge(draft, stored)
        final = rank(planned, evidence.accuracy)
        (fresh / CARD).write_text(card.render(draft.manifest, final, stored, evidence.parity, note))
        _seal(fresh, name or out.name, stored, model_id, final)
        _place(fresh, out)
    return bundles.load(out)


def refuse(out: Path, force: bool) -> None:
    """Raise PackError unless a bundle may be put at `out`."""
    if not os.path.lexists(out):
        return
    if not force:
        raise PackError(f"{out} exists: choose another place, or replace it with --force")
    if out.is_symlink() or not (out / MANIFEST).is_file():
        raise PackError(f"{out} exists and is no bundle: --force replaces only bundles")


def plan(checkpoint: Checkpoint, tiers: Mapping[str, KeepRatio], model_id: str) -> list[Tier]:
    """Tiers without accuracy yet, by MACs from the cheapest. Raises PackError."""
    geometry, planned = checkpoint.model.config.geometry, []
    for name, ratio in tiers.items():
        try:
            counts = geometry.counts(ratio)
        except ValueError as error:
            raise PackError(f"tier {name!r}: {error}") from None
        planned.append(
            Tier(
                name=name,
                model=model_id,
                keep_ratio=float(exact(ratio)),
                token_counts=counts,
                macs=geometry.macs(counts),
            )
        )
    return sorted(planned, key=lambda tier: tier.macs)


def rank(tiers: list[Tier], accuracy: Mapping[str, Accuracy]) -> list[Tier]:
    """The same tiers, in their order, with accuracy; dominated where a cheaper one is as good."""
    ranked, best = [], -1.0
    for tier in tiers:
        measured = accuracy.get(tier.name)
        dominated = measured is not None and measured.top1 <= best
        best = max(best, measured.top1 if measured is not None else best)
        ranked.append(tier.model_copy(update={"accuracy": measured, "dominated": dominated}))
    return ranked


def _graphs(checkpoint: Checkpoint, tiers: list[Tier], folder: Path) -> None:
    places = weights.places(folder / WEIGHTS)
    bar = tqdm(total=1 + len(tiers), desc="exporting graphs", unit="graph", leave=False)
    with bar:
        elastic = graph.elastic(checkpoint.model, checkpoint.preprocess)
        graph.save(graph.bind(elastic, places), folder / ELASTIC_GRAPH)
        bar.update()
        for tier in tiers:
            static = graph.static(elastic, tier.token_counts)
            graph.save(graph.bind(static, places), folder / tier.graph)
            bar.update()


def _seal(
    root: Path, name: str, checkpoint: Checkpoint, model_id: str, tiers: list[Tier]
) -> Bundle:
    """Write the manifest over what lies in `root`, and read the bundle back as the server would."""
    config = checkpoint.model.config
    files = sorted(file for file in root.rglob("*") if file.is_file() and file != root / MANIFEST)
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).replace(microsecond=0),
        producer={
            "pcae-serve": pcae_serve.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "python": platform.python_version(),
        },
        labels=tuple(checkpoint.labels),
        models={
            model_id: Model(
                image_size=config.image_size,
                patches=config.geometry.patches,
                patch_size=config.patch_size,
                width=config.width,
                depth=config.depth,
                parameters=sum(p.numel() for p in checkpoint.model.parameters()),
                reduction_points=config.reduction_points,
                pooling=config.pooling,
            )
        },
        tiers=tuple(tiers),
        files={file.relative_to(root).as_posix(): bundles.sha256(file) for file in files},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
    return bundles.load(root)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out`, gone at the end unless it was moved to its place."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise PackError(f"cannot write beside {out}: {error.strerror}") from None
    try:
        fresh.chmod(0o755)  # mkdtemp makes it the owner's alone
        yield fresh
    except OSError as error:  # such as a full disk
        raise PackError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _place(fresh: Path, out: Path) -> None:
    """Rename into place; what was there before goes last."""
    old = fresh.with_name(f"{fresh.name}.old")
    if os.path.lexists(out):
        out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
