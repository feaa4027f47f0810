"""Measure candidates for tiers on evaluation images and on this machine, for `--tiers auto`.

models -> draft bundle -> keep ratio x precision x model: quality, latency -> tier_front.Front
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import numpy as np

from pcae_export import keep_ratios, pack
from pcae_export.measure import measure_quality
from pcae_export.pack import Part, TierSpec
from pcae_export.profiling import describe, take_turns
from pcae_export.tier_front import Candidate, Front, choose_tiers
from pcae_export.verify import ParityError, verify_model
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Pixels
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_serve.runtime import latency_profile
from pcae_training.data import LabelledImages

#: Difference between neighbouring keep ratios, and the lowest one that is tried.
SPACING, LOWEST = Decimal("0.1"), Decimal("0.1")
#: Duration of the timings, in seconds, and the batch size: what a request on an idle machine waits.
TIMING_S, BATCH = 30.0, 1
#: Above this relative standard error of a latency, a warning is printed.
NOISY = 0.05


@dataclass(frozen=True)
class TierSearch:
    """What candidates are compared on, and how much worse than the best a tier may be."""

    images: LabelledImages
    rows: Sequence[int]  # of images
    pixels: Pixels  # uint8 [N, H, W, 3], to compare int8 graphs with torch on
    max_loss: float  # see `choose_tiers`

    def run(self, parts: Mapping[str, Part], *, int8: bool) -> Front:
        """Measure every candidate of the models of `parts`, and choose tiers.

        int8: include tiers with int8 products, except those that do not pass verification.
        """
        with tempfile.TemporaryDirectory(prefix="pcae-tiers-") as folder:
            draft = _draft(parts, Path(folder) / "draft", int8)
            candidates, noise, machine = self._measure(draft)
            proven: set[str] = set()
            while True:
                front = choose_tiers(candidates, _reference(candidates), noise, self.max_loss)
                if not (refused := self._refuse_int8(draft, parts, front, proven)):
                    break
                candidates = [c for c in candidates if c.tier.name not in refused]
        return replace(front, machine=machine)

    def _measure(self, draft: Bundle) -> tuple[list[Candidate], float, str]:
        """Return the draft's tiers as candidates, the noise of their latencies, and the machine."""
        engine = OnnxRuntimeEngine(draft)
        try:
            labelled = bool(self.images.classes)
            measured = measure_quality(draft, engine, self.images, self.rows, labelled)
            timed = take_turns(engine, draft, draft.tiers, (BATCH,), TIMING_S)[BATCH]
            machine = describe(latency_profile.origin(engine), engine)
        finally:
            engine.close()
        _, noise = keep_ratios.fit_latency(timed)
        if noise > NOISY:
            print(
                "warning: the latencies are uncertain: timings of a tier differ much, or there was"
                " time for a few only; choose tiers on a machine without other work",
                file=sys.stderr,
            )
        candidates = [
            Candidate(tier, measured[tier.name], float(seconds))
            for tier, seconds in zip(draft.tiers, np.median(timed, axis=0), strict=True)
        ]
        return candidates, noise, machine

    def _refuse_int8(
        self, draft: Bundle, parts: Mapping[str, Part], front: Front, proven: set[str]
    ) -> set[str]:
        """Return the chosen int8 tiers that differ from torch by more than they may.

        Prints why. proven: tiers that passed before; those that pass now are added.
        """
        refused = set()
        for tier in (candidate.tier for candidate in front.chosen):
            if tier.precision != "int8" or tier.name in proven:
                continue
            checkpoint = parts[tier.model].checkpoint
            try:
                verify_model(_with_tiers(draft, [tier]), checkpoint, self.pixels, tier.model)
                proven.add(tier.name)
            except ParityError as error:
                refused.add(tier.name)
                what = f"keep ratio {tier.keep_ratio:g} in int8 ({tier.model})"
                print(f"note: {what} is left out: {error}", file=sys.stderr)
        return refused


def _draft(parts: Mapping[str, Part], out: Path, int8: bool) -> Bundle:
    """Return a bundle whose tiers are the candidates; it has the elastic graphs that run them."""
    ends = {"full": TierSpec(1.0)} | ({"full-int8": TierSpec(1.0, "int8")} if int8 else {})
    whole = {
        model: Part(part.checkpoint, {f"{model}-{name}": spec for name, spec in ends.items()})
        for model, part in parts.items()
    }
    draft = pack.write_bundle(whole, out)
    tiers = [
        tier.model_copy(update={"name": f"{some.name}-{tier.name}"})
        for some in draft.tiers
        for tier in keep_ratios.sweep_tiers(draft, some, LOWEST, SPACING)
    ]
    tiers.sort(key=lambda tier: tier.macs)
    return _with_tiers(draft, tiers)


def _with_tiers(bundle: Bundle, tiers: Sequence[Tier]) -> Bundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"tiers": tuple(tiers)}))


def _reference(candidates: Sequence[Candidate]) -> Candidate:
    """Return the best model as it was trained: keep ratio 1, float32."""
    plain = [c for c in candidates if c.tier.keep_ratio == 1 and c.tier.precision == "float32"]
    return max(plain, key=lambda candidate: candidate.score)


def assign_tiers(parts: Mapping[str, Part], front: Front) -> dict[str, Part]:
    """Return the models that have a chosen tier, with these tiers."""
    tiers: dict[str, dict[str, TierSpec]] = {}
    for name, candidate in front.named():
        tier = candidate.tier
        spec = TierSpec(f"{tier.keep_ratio:g}", tier.precision)
        tiers.setdefault(tier.model, {})[name] = spec
    return {
        model: replace(part, tiers=tiers[model]) for model, part in parts.items() if model in tiers
    }
