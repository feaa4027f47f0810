"""Simulated platforms: tiers with their accuracy and the latency of their batches.

gpu, cpu   built in, in profiles/
a file     in the same format, or a latency profile (`pcae-export profile --json`, or cached)
machine    the latency profile of a bundle that the server has cached on this machine
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pcae_serve.bounded_file import read_bounded
from pcae_serve.bounded_json import parse_json
from pcae_serve.bundle.quality import difference_margins, wilson_interval
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.loader import load_configured_engine
from pcae_serve.errors import StartError, one_line
from pcae_serve.frozen_model import FrozenModel
from pcae_serve.runtime import latency_profile
from pcae_serve.runtime.measured_profile import MAX_BATCH_S, MAX_FILE_BYTES, MAX_POINT_BATCH
from pcae_serve.runtime.tiers import escalations
from pcae_serve.scheduling.escalation import Escalation
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.settings import Settings

#: Built-in platforms, each a file in profiles/.
NAMES = ("gpu", "cpu")
#: Name of the profile that the server on this machine would start with.
MACHINE = "machine"


class BatchSeconds(FrozenModel):
    """Latency of a batch size."""

    batch: int = Field(ge=1, le=MAX_POINT_BATCH)
    p50_s: float = Field(gt=0, le=MAX_BATCH_S)
    p99_s: float = Field(gt=0, le=MAX_BATCH_S)


class TimedTier(FrozenModel):
    name: str
    accuracy: float = Field(ge=0, le=1)  # or agreement with the full model, if not measured
    n: int | None = Field(None, ge=1)  # images that it was measured on; None: it is exact
    points: tuple[BatchSeconds, ...] = Field(min_length=1)


class Platform(FrozenModel):
    """A device with the tiers that it runs, cheapest first."""

    source: str  # origin of the figures, for people to read
    tiers: tuple[TimedTier, ...] = Field(min_length=1)
    #: Requests per second that load 1 stands for, by mix; computed if a mix is missing.
    capacity_per_s: dict[str, float] = Field(default_factory=dict)
    #: What second looks gain; empty: unknown, so that there are none.
    escalations: tuple[Escalation, ...] = ()

    @property
    def tier_table(self) -> TierTable:
        accuracy = tuple(tier.accuracy for tier in self.tiers)
        intervals = [wilson_interval(tier.accuracy, tier.n) for tier in self.tiers if tier.n]
        known = len(intervals) == len(self.tiers)
        margins = difference_margins(accuracy, intervals) if known else ()
        names = tuple(tier.name for tier in self.tiers)
        return TierTable(names, accuracy, margins, self.escalations)

    @property
    def full_s(self) -> float:
        """The last tier's latency at batch 1, the unit of budget mixes."""
        return self.latency(1).forecast(0.0).p50(len(self.tiers) - 1, 1)

    def latency(self, max_batch: int) -> Latency:
        """Return a latency model that starts from these points."""
        return Latency(self._points(), max_batch)

    def seconds(self, max_batch: int) -> list[dict[int, Seconds]]:
        """Return quantiles of every batch size for each tier, as the latency model starts out.

        Linear between the points, extrapolated beyond the last one.
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
    """Return a built-in platform, one from a file, or this machine's.

    A latency profile takes its accuracies from `bundle`, by default the demo bundle. Raise
    StartError if it cannot be read, or does not fit the bundle.
    """
    if name in NAMES:
        text = (files("pcae_serve.loadtest") / "profiles" / f"{name}.json").read_text(
            encoding="utf-8"
        )
        return Platform.model_validate_json(text)
    if name == MACHINE:
        return _read_machine(load_bundle(bundle or demo_path()))
    try:
        content = parse_json(read_bounded(Path(name), MAX_FILE_BYTES))
    except (OSError, ValueError) as error:
        known = ", ".join((*NAMES, MACHINE))
        raise StartError(
            f"cannot read the profile {name}: {one_line(error)}; use {known} or a file"
        ) from None
    try:
        if isinstance(content, dict) and "tiers" in content:
            return Platform.model_validate(content)
        profile = latency_profile.Profile.model_validate(_unwrap(content))
        profile.check()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StartError(f"{name} is not a profile: {place}: {first['msg']}") from None
    except ValueError as error:
        raise StartError(f"{name} cannot be used: {error}") from None
    return of_profile(profile, load_bundle(bundle or demo_path()), name)


def of_profile(profile: latency_profile.Profile, bundle: Bundle, name: str) -> Platform:
    """Return the tiers of a bundle that `auto` uses, with the measured latencies."""
    names = [tier.name for tier in bundle.tiers]
    if list(profile.points) != names:
        raise StartError(
            f"{name} has the tiers {', '.join(profile.points)}, but the bundle {bundle.root} has"
            f" {', '.join(names)}; set --bundle to the bundle that was profiled"
        )
    tiers = []
    for tier, points in zip(bundle.tiers, profile.seconds(), strict=True):
        if tier.quality is None:
            raise StartError(
                f"{bundle.root}: tier {tier.name!r} has no measured accuracy or agreement"
            )
        if not tier.dominated:
            seconds = tuple(
                BatchSeconds(batch=batch, p50_s=s.p50, p99_s=s.p99) for batch, s in points.items()
            )
            tiers.append(
                TimedTier(
                    name=tier.name, accuracy=tier.quality, n=tier.quality_images, points=seconds
                )
            )
    origin = profile.origin
    on = origin.gpu or origin.processor or "unknown processor"
    source = f"measured {origin.date:%Y-%m-%d} on {on}, {origin.cores} cores: {bundle.root.name}"
    looks = escalations(
        [tier.name for tier in tiers],
        [tier.accuracy for tier in tiers],
        bundle.manifest.calibration,
    )
    return Platform(source=source, tiers=tuple(tiers), escalations=looks)


def _read_machine(bundle: Bundle) -> Platform:
    """Return the cached profile that the server here would start with, by its PCAE_* settings."""
    settings = Settings()
    engine = load_configured_engine(settings, bundle)
    profile = latency_profile.read(bundle, engine, settings.cache_dir)
    if profile is None:
        raise StartError(
            f"no latency profile of {bundle.root} is cached on this machine; start the server once,"
            " run pcae-export profile, or use --profile gpu"
        )
    return of_profile(profile, bundle, "the cached profile")


def _unwrap(content: Any) -> Any:
    """Return the profile inside a report of `pcae-export profile --json`."""
    return content["profile"] if isinstance(content, dict) and "profile" in content else content
