"""Render the model card (README.md of a bundle) from measurements made elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pcae_export.feature_fidelity import FeatureFidelity
from pcae_export.verify import AGREEMENT, COSINE, LEGEND, MARGIN, TOLERANCE, Parity
from pcae_serve.bundle.manifest import Manifest, Model, Tier
from pcae_training.checkpoint import Checkpoint
from pcae_training.model import ViTConfig

#: What a tier's quality was measured on; `pcae-train evaluate` runs the unrounded checkpoint.
PRECISION = (
    "measured with the weights rounded to float16, as stored; `pcae-train evaluate` uses the"
    " checkpoint's own weights, so its figures may differ slightly"
)
#: Training settings that are paths on the training machine or do not affect the result.
PRIVATE = {"out", "init", "resume", "stop_after", "threads", "workers"}
#: Headings of the kinds of features.
KINDS = {"cls": "CLS", "mean": "mean over patches", "dense": "patches"}
#: Model sizes among the settings, omitted for a phase that started from another's model.
SIZES = {"image_size", "width", "depth", "heads"}


def render(
    manifest: Manifest,
    tiers: Sequence[Tier],
    checkpoints: Mapping[str, Checkpoint],
    parity: Mapping[str, Parity],
    note: str = "",
    features: Mapping[str, FeatureFidelity] = MappingProxyType({}),
    looks: str = "",
) -> str:
    """Return the card in Markdown.

    manifest: may be the draft's. tiers: with their quality. checkpoints, parity: by model id. note:
    a paragraph to insert before the tiers. features: by tier, of models without a head. looks:
    what second looks reach, in Markdown.
    """
    several = len(checkpoints) > 1
    parts = ["\n".join(_hub_fields(manifest)), f"# {manifest.name}"]
    for model_id, checkpoint in checkpoints.items():
        parts.append((f"**{model_id}**: " if several else "") + _about(checkpoint))
    parts += [*([note.strip()] if note.strip() else []), "## Tiers"]
    parts.append("\n".join(_tiers(tiers, checkpoints)))
    if features:
        parts += ["## Features", "\n".join(_features(tiers, features))]
    parts += ["## Second looks", looks] if looks else []
    parts.append("## Training")
    for model_id, checkpoint in checkpoints.items():
        parts += [f"**{model_id}**"] if several else []
        history = "\n".join(_training(checkpoint.training))
        parts.append(history or "Not recorded: the checkpoint does not contain it.")
    parts.append("## Parity")
    for model_id in checkpoints:
        parts += [f"**{model_id}**"] if several else []
        parts.append(_parity(parity.get(model_id)))
        parts += [_half(manifest.models[model_id])] if model_id in manifest.models else []
    made = ", ".join(f"{tool} {version}" for tool, version in manifest.producer.items())
    parts += ["## Made with", f"{made}, on {manifest.created:%Y-%m-%d}."]
    return "\n\n".join(parts) + "\n"


def _hub_fields(manifest: Manifest) -> Iterator[str]:
    """Yield the YAML that the Hugging Face hub reads: what to use the bundle with, and for."""
    features = next(iter(manifest.models.values())).answers == "features"
    yield "---"
    yield "library_name: pcae-serve"
    yield f"pipeline_tag: image-{'feature-extraction' if features else 'classification'}"
    yield "tags: [vision-transformer, onnx, token-reduction]"
    yield "---"


def _about(checkpoint: Checkpoint) -> str:
    config, labels = checkpoint.model.config, checkpoint.labels
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    some = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
    verb = f"classifies images into {len(labels)} classes"
    if checkpoint.answers == "labels":
        verb = f"gives the probability of each of {len(labels)} independent labels"
    purpose = f"{verb} ({some})" if labels else f"computes {config.features} features per image"
    return (
        f"A vision transformer ({parameters / 1e6:.2f} million parameters, width {config.width},"
        f" depth {config.depth}) that {purpose}. Images have {config.image_size} x"
        f" {config.image_size} pixels, divided into {config.geometry.patches} patches."
        f" {_reduction(config)} All tiers share one set of weights, stored as float16. For"
        " `pcae-serve`."
    )


def _reduction(config: ViTConfig) -> str:
    """Return a sentence on how patches are reduced."""
    if not config.reduction_points:
        return "It keeps all patches."
    points = ", ".join(map(str, config.reduction_points))
    verb = "drops" if config.reduction != "merged" else "merges into others"
    patches = {
        "random": "a fixed random choice of patches",
        "attention": "the patches that receive the least attention",
        "ptr-normalised": "the patches most similar to the mean of the normalised patches",
    }.get(config.reduction, "the patches most similar to the mean patch")
    name = "" if config.reduction == "ptr" else f"; rule `{config.reduction}`"
    return (
        f"After blocks {points} it {verb} {patches} (progressive token reduction, the PCAE"
        f" paper{name})."
    )


def _tiers(tiers: Sequence[Tier], checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    several = len(checkpoints) > 1
    int8 = any(tier.precision == "int8" for tier in tiers)
    largest = max(_full_macs(checkpoint) for checkpoint in checkpoints.values())
    header = ["tier"] + ["model"] * several + ["keep ratio", "patches kept after each stage"]
    header += ["tokens in the last block"] + ["precision"] * int8 + ["GMACs", "MAC ratio"]
    header += [_measure(tiers)]
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for tier in tiers:
        geometry = checkpoints[tier.model].model.config.geometry
        quality = format_quality(tier)
        cells = [tier.name] + [tier.model] * several
        cells += [f"{tier.keep_ratio:g}", ", ".join(map(str, tier.token_counts)) or "all"]
        cells += [str(geometry.tokens_per_block(tier.token_counts)[-1])] + [tier.precision] * int8
        cells += [f"{tier.macs / 1e9:.3f}", f"{largest / tier.macs:.2f}"]
        cells += [f"{quality}, dominated" if tier.dominated else quality]
        yield "| " + " | ".join(cells) + " |"
    explained = _explained(tiers)
    if explained:
        yield ""
        yield (
            f"{explained}, from image files, with ONNX Runtime on the elastic graph (one graph for"
            f" all tiers, its token counts are an input), as served; {PRECISION}. MAC ratio:"
            " multiply-adds of the largest model at keep ratio 1 over the tier's."
        )


def _features(tiers: Sequence[Tier], features: Mapping[str, FeatureFidelity]) -> Iterator[str]:
    """Yield a table of how close each tier's features are to those at keep ratio 1."""
    kinds = [kind for kind in KINDS if any(kind in found.cosines for found in features.values())]
    yield f"| tier | keep ratio | {' | '.join(KINDS[kind] for kind in kinds)} | images |"
    yield "|" + " --- |" * (3 + len(kinds))
    for tier in tiers:
        if (found := features.get(tier.name)) is None:
            continue
        cells = [
            f"{found.cosines[kind].mean():.4f}" if kind in found.cosines else "-" for kind in kinds
        ]
        yield f"| {tier.name} | {tier.keep_ratio:g} | {' | '.join(cells)} | {found.images} |"
    yield ""
    yield (
        "Mean cosine to the same features at keep ratio 1, by torch on the weights as stored; a"
        " bundle returns CLS or the mean (`--pooling`), and patches with `--dense`. Patches: the"
        " mean over all patches of an image; one that was dropped has the state that it was dropped"
        " with, one that was merged that of the patch it went into. Tiers in int8 are not measured"
        " here."
    )


def _full_macs(checkpoint: Checkpoint) -> int:
    geometry = checkpoint.model.config.geometry
    return geometry.macs(geometry.counts(1))


def _measure(tiers: Sequence[Tier]) -> str:
    """Return the heading of the quality column."""
    if any(tier.agreement for tier in tiers):
        return "same class as at keep ratio 1"
    if any(tier.fidelity for tier in tiers):
        return "cosine of the features to those at keep ratio 1"
    return "top-1 (95 % interval)"


def _explained(tiers: Sequence[Tier]) -> str:
    for tier in tiers:
        if (found := tier.accuracy) is not None:
            return f"Top-1 on {found.n:,} images of {found.data_set}, with Wilson's 95 % interval"
        if (other := tier.agreement or tier.fidelity) is not None:
            return (
                f"Compared with the same model at keep ratio 1, without labels, on {other.n:,}"
                f" images of {other.data_set}"
            )
    return ""


def format_quality(tier: Tier) -> str:
    """Return a tier's quality as text, such as "93.10 % [92.59, 93.58] of 10,000"."""
    if tier.accuracy is not None:
        low, high = (100 * bound for bound in tier.accuracy.interval)
        return f"{100 * tier.accuracy.top1:.2f} % [{low:.2f}, {high:.2f}] of {tier.accuracy.n:,}"
    if tier.agreement is not None:
        return f"{100 * tier.agreement.share:.1f} % of {tier.agreement.n:,}"
    if tier.fidelity is not None:
        return f"{tier.fidelity.cosine:.4f} over {tier.fidelity.n:,}"
    return "not measured"


def _training(training: dict[str, Any]) -> Iterator[str]:
    """Yield a list item per phase, the earliest first; `init` is the phase it started from."""
    phases = []
    while training:
        phases.append(training)
        training = training.get("init") or {}
    for number, phase in enumerate(reversed(phases), 1):
        if set(phase) == {"source"}:  # weights of others, by name
            yield f"{number}. Weights of {phase['source']}."
            continue
        settings = dict(phase.get("settings", {}))
        if "data" in settings:
            settings["data"] = Path(str(settings["data"])).name
        omitted = PRIVATE | (SIZES if settings.get("init") else set())
        flags = ", ".join(
            f"{k} {_plain(v)}" for k, v in settings.items() if k not in omitted and v is not None
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
    return f"; top-1 on held-out images {when}: {shares}"


def _parity(parity: Parity | None) -> str:
    if parity is None:
        return "Not verified."
    return (
        f"Every graph was compared with torch on the stored weights: {parity}. Limits in float32: a"
        f" difference of {TOLERANCE:g} and the same patches, on images whose similarity gap exceeds"
        f" {MARGIN:g} at every cut (the others are near ties), and {TOLERANCE:g} on all images with"
        " equal sets. Limits in other precisions: the same class on"
        f" {100 * AGREEMENT:.1f} % of images, as far as this number of images can show it, or a"
        f" mean cosine of {COSINE:g}.\n\n" + "\n".join(parity.format_table()) + f"\n\n{LEGEND}"
    )


def _half(model: Model) -> str:
    """Return a sentence on the precision of the graphs for GPUs and what it was chosen by."""
    found = model.half_range
    if model.half is None or found is None:
        return "The range of half precision was not measured."
    return (
        f"The graphs for GPUs are in {model.half}. The largest value that they compute in it is"
        f" {found.largest:,.1f} ({found.tensor}, on {found.images} images); float16 ends at 65,504."
    )


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
