"""The model card: what the bundle is, what it costs, how good it is and how that is known.

It writes down what it is given and measures nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pcae_export.verify import MARGIN, TOLERANCE, Parity
from pcae_serve.bundle import Accuracy, Manifest, Tier
from pcae_training.checkpoint import Checkpoint

#: Settings that name places on the machine that trained, or change nothing of the outcome.
PRIVATE = {"out", "init", "resume", "stop_after", "threads", "workers"}
#: Settings of a model's sizes, which count only where a phase began a model of its own.
SIZES = {"image_size", "width", "depth", "heads"}


def render(
    manifest: Manifest,
    tiers: Sequence[Tier],
    checkpoint: Checkpoint,
    parity: Parity | None,
    note: str = "",
) -> str:
    """The card in Markdown. `manifest` may still be the draft's; `tiers` carry the accuracy."""
    parts = [
        f"# {manifest.name}",
        _about(checkpoint),
        *([note.strip()] if note.strip() else []),
        "## Tiers",
        "\n".join(_tiers(tiers, checkpoint)),
        "## Training",
        "\n".join(_training(checkpoint.training)) or "Not recorded: the weights came without it.",
        "## Parity",
        _parity(parity),
        "## Made with",
        ", ".join(f"{tool} {version}" for tool, version in manifest.producer.items())
        + f", on {manifest.created:%Y-%m-%d}.",
    ]
    return "\n\n".join(parts) + "\n"


def _about(checkpoint: Checkpoint) -> str:
    config, labels = checkpoint.model.config, checkpoint.labels
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    points = ", ".join(map(str, config.reduction_points))
    some = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
    return (
        f"A vision transformer ({parameters / 1e6:.2f} million parameters, width {config.width},"
        f" depth {config.depth}) that tells {len(labels)} classes apart ({some}) in images of"
        f" {config.image_size} x {config.image_size} pixels, cut into {config.geometry.patches}"
        " patches."
        f" After blocks {points} it drops the patches most like the mean patch (progressive token"
        " reduction, the PCAE paper): one set of weights, stored as float16, answers at every tier"
        " below. For `pcae-serve`."
    )


def _tiers(tiers: Sequence[Tier], checkpoint: Checkpoint) -> Iterator[str]:
    geometry = checkpoint.model.config.geometry
    full = geometry.macs(geometry.counts(1))
    yield (
        "| tier | keep ratio | patches kept after each stage | tokens in the last block | GMACs"
        " | MAC ratio | top-1 (95 % interval) |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for tier in tiers:
        top1 = quality(tier.accuracy) if tier.accuracy else "not measured"
        cells = (
            tier.name,
            f"{tier.keep_ratio:g}",
            ", ".join(map(str, tier.token_counts)),
            str(geometry.tokens_per_block(tier.token_counts)[-1]),
            f"{tier.macs / 1e9:.3f}",
            f"{full / tier.macs:.2f}",
            f"{top1}, dominated" if tier.dominated else top1,
        )
        yield "| " + " | ".join(cells) + " |"
    measured = next((tier.accuracy for tier in tiers if tier.accuracy), None)
    if measured:
        yield ""
        yield (
            f"Top-1 on {measured.n:,} images of {measured.data_set}, from image files through the"
            " elastic graph in ONNX Runtime, as served; Wilson interval. MAC ratio: multiply-adds"
            " at keep ratio 1 over the tier's."
        )


def quality(accuracy: Accuracy) -> str:
    """An accuracy in words: 93.10 % [92.59, 93.58] of 10,000."""
    low, high = (100 * bound for bound in accuracy.interval)
    return f"{100 * accuracy.top1:.2f} % [{low:.2f}, {high:.2f}] of {accuracy.n:,}"


def _training(training: dict[str, Any]) -> Iterator[str]:
    """One item for each phase, the earliest first: a phase names the one it started from `init`."""
    phases = []
    while training:
        phases.append(training)
        training = training.get("init") or {}
    for number, phase in enumerate(reversed(phases), 1):
        settings = dict(phase.get("settings", {}))
        if "data" in settings:
            settings["data"] = Path(str(settings["data"])).name
        unsaid = PRIVATE | (SIZES if settings.get("init") else set())
        flags = ", ".join(
            f"{k} {_plain(v)}" for k, v in settings.items() if k not in unsaid and v is not None
        )
        versions = ", ".join(f"{k} {v}" for k, v in phase.get("versions", {}).items())
        yield f"{number}. {_history(phase)}" + (f" With {versions}." if versions else "")
        yield f"   Settings: {flags or 'not recorded'}."


def _history(phase: dict[str, Any]) -> str:
    history: list[dict[str, Any]] = phase.get("history", [])
    epochs = [entry for entry in history if "epoch" in entry]
    planned = phase.get("settings", {}).get("epochs")
    text = f"{phase.get('epochs_done', len(epochs))} epochs"
    if planned is not None and planned != phase.get("epochs_done"):
        text += f" of {planned} planned"
    if epochs:
        hours = sum(entry.get("train_s", 0.0) for entry in epochs) / 3600
        losses = [entry["train_loss"] for entry in epochs if "train_loss" in entry]
        text += f" in {hours:.2f} h of training steps"
        text += f", training loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
        text += _held_out(epochs[-1].get("holdout_top1", {}), "after the last epoch")
    final: dict[str, Any] = phase.get("final", {})
    text += _held_out({ratio: found["top1"] for ratio, found in final.items()}, "at the end")
    return text + "."


def _held_out(top1: dict[str, float], when: str) -> str:
    if not top1:
        return ""
    shares = ", ".join(f"{100 * share:.2f} % at keep {ratio}" for ratio, share in top1.items())
    return f"; top-1 on the images held out of training {when}: {shares}"


def _parity(parity: Parity | None) -> str:
    if parity is None:
        return "Not checked: exported without images."
    return (
        "Every tier's graphs were held against torch with the weights as stored, on images of the"
        f" evaluation data: {parity}. Allowed: {TOLERANCE:g} on every logit, the same patches kept"
        " and the same class, for images whose similarity margin at every cut exceeds"
        f" {MARGIN:g}; the others are the near ties."
    )


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
