"""What a simulation serves on: tiers with their accuracy, and the seconds of their batches.

    gpu, cpu   ready-made, in this folder
    a file     of this shape; or a profile of `pcae-export profile` or the cache, beside its bundle
    machine    this machine's cached profile of a bundle

It knows files and bundles; it does not know policies, traces, or what a simulation makes of it.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.loader import load_configured_engine
from pcae_serve.errors import StartError, one_line
from pcae_serve.frozen_model import FrozenModel
from pcae_serve.runtime import latency_profile
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.settings import Settings

#: Ready-made, each a file here.
NAMES = ("gpu", "cpu")
#: The word for what the server itself would start from.
MACHINE = "machine"


class BatchSeconds(FrozenModel):
    """How long a batch of that size takes."""

    batch: int = Field(ge=1)
    p50_s: float = Field(gt=0, allow_inf_nan=False)
    p99_s: float = Field(gt=0, allow_inf_nan=False)


class TimedTier(FrozenModel):
    name: str
    accuracy: float = Field(ge=0, le=1)  # agreement with the full model where none was measured
    points: tuple[BatchSeconds, ...] = Field(min_length=1)


class Platform(FrozenModel):
    """A device with the tiers that it runs, the cheapest first."""

    source: str  # where the figures are from, for people
    tiers: tuple[TimedTier, ...] = Field(min_length=1)
    #: Requests a second that load 1.0 stands for, by mix, where it has been worked out before.
    capacity_per_s: dict[str, float] = Field(default_factory=dict)

    @property
    def tier_table(self) -> TierTable:
        return TierTable(
            tuple(tier.name for tier in self.tiers), tuple(tier.accuracy for tier in self.tiers)
        )

    @property
    def full_s(self) -> float:
        """The last tier's seconds at batch 1, which budgets are multiples of."""
        return self.latency(1).forecast(0.0).p50(len(self.tiers) - 1, 1)

    def latency(self, max_batch: int) -> Latency:
        """The latency model that starts from these points."""
        return Latency(self._points(), max_batch)

    def seconds(self, max_batch: int) -> list[dict[int, Seconds]]:
        """For each tier, of every batch size: as the latency model predicts before it has learnt.

        Between the points lie lines, and beyond the last one the line goes on.
        """
        forecast = self.latency(max_batch).forecast(0.0)
        return [
            {
                batch: Seconds(forecast.p50(i, batch), forecast.p99(i, batch))
                for batch in range(1, max_batch + 1)
            }
            for i in range(len(self.tiers))
        ]

    def _points(self) -> list[dict[int, Seconds]]:
        return [{p.batch: Seconds(p.p50_s, p.p99_s) for p in tier.points} for tier in self.tiers]


def read(name: str, bundle: Path | None = None) -> Platform:
    """A ready-made platform, a file's, or this machine's; `bundle` (the demo) tells accuracies."""
    if name in NAMES:
        text = (files("pcae_serve.loadtest") / "profiles" / f"{name}.json").read_text(
            encoding="utf-8"
        )
        return Platform.model_validate_json(text)
    if name == MACHINE:
        return _of_machine(load_bundle(bundle or demo_path()))
    try:
        content = json.loads(Path(name).read_bytes())
    except (OSError, ValueError) as error:
        known = ", ".join((*NAMES, MACHINE))
        raise StartError(
            f"cannot read the profile {name}: {one_line(error)}; there are {known}, or a file"
        ) from None
    try:
        if isinstance(content, dict) and "tiers" in content:
            return Platform.model_validate(content)
        profile = latency_profile.Profile.model_validate(_profile(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StartError(f"{name} is no profile: {place}: {first['msg']}") from None
    return of_profile(profile, load_bundle(bundle or demo_path()), name)


def of_profile(profile: latency_profile.Profile, bundle: Bundle, name: str) -> Platform:
    """The tiers of a bundle that `auto` would take, with the seconds that were measured."""
    names = [tier.name for tier in bundle.tiers]
    if list(profile.points) != names:
        raise StartError(
            f"{name} has the tiers {', '.join(profile.points)}, the bundle {bundle.root}"
            f" {', '.join(names)}: give the --bundle that was profiled"
        )
    tiers = []
    for tier, points in zip(bundle.tiers, profile.seconds(), strict=True):
        if tier.quality is None:
            raise StartError(f"{bundle.root}: nobody measured how good tier {tier.name!r} is")
        if not tier.dominated:
            seconds = tuple(
                BatchSeconds(batch=batch, p50_s=s.p50, p99_s=s.p99) for batch, s in points.items()
            )
            tiers.append(TimedTier(name=tier.name, accuracy=tier.quality, points=seconds))
    origin = profile.origin
    on = origin.gpu or origin.processor or "unknown processor"
    source = f"measured {origin.date:%Y-%m-%d} on {on}, {origin.cores} cores: {bundle.root.name}"
    return Platform(source=source, tiers=tuple(tiers))


def _of_machine(bundle: Bundle) -> Platform:
    """As the server here would start with that bundle: its settings name backend and cache."""
    settings = Settings()
    engine = load_configured_engine(settings, bundle)
    profile = latency_profile.read(bundle, engine, settings.cache_dir)
    if profile is None:
        raise StartError(
            f"no profile of {bundle.root} is cached on this machine: start the server once, run"
            " pcae-export profile, or take --profile gpu"
        )
    return of_profile(profile, bundle, "the cached profile")


def _profile(content: Any) -> Any:
    """`pcae-export profile --json` puts more around it."""
    return content["profile"] if isinstance(content, dict) and "profile" in content else content
