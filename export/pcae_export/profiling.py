"""`pcae-export profile`: time a bundle's tiers on this machine.

    time the tiers in turns -> profile in the cache -> table -> suggested keep ratios

The server reads the profile from the cache; `keep_ratios` makes the suggestion.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import CliPositionalArg, NoDecode

from pcae_export import keep_ratios
from pcae_export.bundle_source import BUNDLE_HELP, open_bundle
from pcae_export.keep_ratios import Suggestion
from pcae_export.progress import Progress
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Engine
from pcae_serve.engines.loader import load_configured_engine
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.runtime import latency_profile
from pcae_serve.runtime.latency_profile import Origin, Rounds
from pcae_serve.settings import Settings
from pcae_serve.sources.names import ModelName

#: Rounds after which timing stops early.
MAX_ROUNDS = 1000
#: Share of --seconds spent on the sweep that the suggestion needs.
SWEEP_SHARE = 1 / 3
#: Keep ratios are suggested for one image per batch, which is what a request waits for on an idle
#: machine.
SWEEP_BATCH = 1
#: Engines on the elastic graph, which runs any token counts; the others have one graph per tier.
ELASTIC = {"onnxruntime", "simulated"}
#: A speed above this share of the MAC ratio needs an explanation: less arithmetic cannot save more.
SUSPECT = 1.02

#: Peak of dense float16 on tensor cores with float32 accumulation, FLOP/s, by the name that the
#: driver reports. Sources: NVIDIA's data sheets (sparse figures halved); for the 4090, appendix A
#: of the Ada architecture's white paper.
PEAKS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def read_batches(value: object) -> tuple[int, ...]:
    """Parse batch sizes from "1,4,8" or numbers. Returns each size once, ascending.

    Raises ValueError if one is not a whole number, or 1 is missing.
    """
    if isinstance(value, str):
        value = value.split(",")
    try:
        batches = sorted({int(size) for size in value}) if isinstance(value, Sequence) else []
    except (TypeError, ValueError):
        raise ValueError(
            f"batch sizes must be whole numbers such as 1,4,8, not {value!r}"
        ) from None
    if not batches or batches[0] != 1:
        raise ValueError("batch sizes must be 1 or more and include 1")
    return tuple(batches)


class Profile(BaseModel):
    """Time every tier on this machine, store the latency profile, and suggest keep ratios.

    The server reads the profile at start. Omitted flags default to the server's settings:
    PCAE_* variables, PCAE_CONFIG, built-in defaults.
    """

    bundle: CliPositionalArg[Annotated[ModelName, Metavar("BUNDLE")]] = Field(
        description=BUNDLE_HELP
    )
    device: str | None = Field(None, description="auto, cpu or cuda:N (default: the server's)")
    backend: str | None = Field(None, description="the server's --backend (default: its setting)")
    threads: int | None = Field(
        None, description="threads per batch; 0: one per core (default: the server's)"
    )
    cache_dir: Path | None = Field(
        None, description="cache folder to write to (default: the server's)"
    )
    batches: Annotated[tuple[int, ...], NoDecode, BeforeValidator(read_batches)] = Field(
        (1, 2, 4, 8), description="batch sizes to time, such as 1,4,8"
    )
    seconds: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="duration in seconds; a third of it is spent on --suggest",
    )
    suggest: int = Field(5, ge=0, description="number of keep ratios to suggest; 0: none")
    lowest: float = Field(0.3, gt=0, le=1, description="lowest keep ratio to suggest")
    json_: Path | None = Field(
        None, alias="json", description="also write all results to this file, as JSON"
    )
    png: Path | None = Field(
        None, description="plot the quality of the tiers against the time of an image to this file"
    )

    def cli_cmd(self) -> None:
        given = self.model_dump(
            include={"device", "backend", "threads", "cache_dir"}, exclude_none=True
        )
        settings = Settings(**given)
        if self.batches[-1] > settings.max_batch:
            raise PcaeError(
                f"--batches includes {self.batches[-1]}, above the server's largest batch"
                f" {settings.max_batch} (PCAE_MAX_BATCH)"
            )
        bundle = open_bundle(self.bundle, settings.cache_dir)
        engine = load_configured_engine(settings, bundle)
        sweep_s = self.seconds * SWEEP_SHARE if self.suggest else 0.0
        timed = take_turns(engine, bundle, bundle.tiers, self.batches, self.seconds - sweep_s)
        profile = latency_profile.summarise(bundle, engine, timed)
        rows = compare_tiers(bundle.tiers, timed, PEAKS.get(profile.origin.gpu or ""))
        print(describe(profile.origin, engine))
        print(format_table(rows))
        for note in format_notes(rows, self.batches, self.seconds):
            print(note)
        print(f"profile written to {_keep(profile, settings.cache_dir)}")

        suggested = self._suggest(bundle, engine, timed, sweep_s) if self.suggest else None
        if self.json_ is not None:
            _write_json(
                self.json_,
                {
                    "profile": profile.model_dump(mode="json"),
                    "rows": [asdict(row) | {"of_macs": row.of_macs} for row in rows],
                    "suggestion": None if suggested is None else asdict(suggested),
                },
            )
        if self.png is not None:
            _draw(self.png, bundle, rows, describe(profile.origin, engine))
        print(f"serve it with: pcae-serve --bundle {self.bundle}")

    def _suggest(self, bundle: Bundle, engine: Engine, timed: Rounds, limit_s: float) -> Suggestion:
        """Suggest keep ratios and print them; from a sweep if the engine can run one."""
        tiers, swept = bundle.tiers, engine.name in ELASTIC
        if swept:
            tiers = keep_ratios.sweep_tiers(bundle, bundle.tiers[-1], self.lowest)
            timed = take_turns(engine, bundle, tiers, (SWEEP_BATCH,), limit_s)
        suggested = keep_ratios.suggest_tiers(tiers, timed[SWEEP_BATCH], self.suggest)
        print()
        print(
            "\n".join(format_suggestion(suggested, self.suggest, engine.name, swept, self.seconds))
        )
        return suggested


def take_turns(
    engine: Engine, bundle: Bundle, tiers: Sequence[Tier], batches: Sequence[int], limit_s: float
) -> Rounds:
    """Run `latency_profile.take_turns` with a progress bar over the seconds."""
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"
    with Progress("timing", limit_s, "s", bar_format) as bar:
        shown_s = 0.0

        def progress(elapsed_s: float) -> None:
            nonlocal shown_s
            bar.update(min(elapsed_s, limit_s) - shown_s)
            shown_s = min(elapsed_s, limit_s)

        return latency_profile.take_turns(
            engine,
            tiers,
            batches,
            bundle.image_size,
            limit_s,
            max_rounds=MAX_ROUNDS,
            progress=progress,
        )


@dataclass(frozen=True)
class Row:
    """One tier at one batch size. Times are per batch unless named otherwise."""

    tier: str
    batch: int
    runs: int
    p50_ms: float
    p95_ms: float | None
    p99_ms: float | None
    image_ms: float
    images_per_s: float
    speed: float  # the costliest tier's time over this tier's in the same round, median of rounds
    speed_low: float  # its quartiles
    speed_high: float
    mac_ratio: float  # the costliest tier's MACs over this one's
    peak_share: float | None  # of the GPU's peak arithmetic, if that is known

    @property
    def of_macs(self) -> float:
        """Return the speed over the MAC ratio: 1 if time falls as much as arithmetic."""
        return self.speed / self.mac_ratio


def compare_tiers(tiers: Sequence[Tier], rounds: Rounds, peak: float | None) -> list[Row]:
    """Return a row per (batch, tier). peak: the GPU's, in FLOP/s."""
    rows = []
    for batch, seconds in rounds.items():
        ratios = seconds[:, -1:] / seconds  # [rounds, tiers]
        for i, tier in enumerate(tiers):
            point = latency_profile.point(batch, seconds[:, i])
            low, middle, high = np.quantile(ratios[:, i], [0.25, 0.5, 0.75])
            flops_per_s = 2 * tier.macs * batch / point.p50_s
            rows.append(
                Row(
                    tier=tier.name,
                    batch=batch,
                    runs=point.runs,
                    p50_ms=1e3 * point.p50_s,
                    p95_ms=_ms(point.p95_s),
                    p99_ms=_ms(point.p99_s),
                    image_ms=1e3 * point.p50_s / batch,
                    images_per_s=batch / point.p50_s,
                    speed=float(middle),
                    speed_low=float(low),
                    speed_high=float(high),
                    mac_ratio=tiers[-1].macs / tier.macs,
                    peak_share=None if peak is None else flops_per_s / peak,
                )
            )
    return rows


def describe(origin: Origin, engine: Engine) -> str:
    """Describe the machine and versions of a measurement in one line."""
    where = f"{origin.gpu} with " if origin.gpu else ""
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return (
        f"{where}{origin.processor or 'unknown processor'}, {origin.cores} cores,"
        f" {origin.memory_gb:g} GB; {engine.name} on {engine.device},"
        f" threads per batch: {origin.threads or 'one per core'};"
        f" {versions}; {origin.date:%Y-%m-%d %H:%M} UTC"
    )


def format_table(rows: Sequence[Row]) -> str:
    """Format the rows as text. The last column is omitted if no peak is known."""
    shares = any(row.peak_share is not None for row in rows)
    lines = [
        f"{'tier':<12} {'batch':>5} {'runs':>5} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}"
        f" {'ms/image':>9} {'images/s':>9}  {'speed (quartiles)':<18} {'of MACs':>8}"
        + ("  of peak" if shares else "")
    ]
    for row in rows:
        quartiles = f"{row.speed:.2f} ({row.speed_low:.2f}-{row.speed_high:.2f})"
        lines.append(
            f"{row.tier:<12} {row.batch:>5} {row.runs:>5} {row.p50_ms:>9.2f} {_cell(row.p95_ms):>9}"
            f" {_cell(row.p99_ms):>9} {row.image_ms:>9.2f} {row.images_per_s:>9.1f}"
            f"  {quartiles:<18} {row.of_macs:>7.2f}{'!' if row.of_macs > SUSPECT else ' '}"
            + (f" {row.peak_share:>8.1%}" if row.peak_share is not None else "")
        )
    return "\n".join(line.rstrip() for line in lines)


def format_notes(rows: Sequence[Row], batches: Sequence[int], seconds: float) -> Iterator[str]:
    """Explain the table's columns, its missing values and its reliability, a line each."""
    yield "speed: time of the costliest tier over this tier's, within one round"
    yield "of MACs: speed over the ratio of multiply-adds; 1.00 if time falls as much as arithmetic"
    missing = [str(batch) for batch in batches if batch not in {row.batch for row in rows}]
    if missing:
        yield f"batch {', '.join(missing)}: no round completed in time; raise --seconds"
    runs = [row.runs for row in rows]
    if any(row.p99_ms is None for row in rows):
        enough_s = seconds * 101 / (1 + min(runs))
        yield f"—: too few runs: p95 needs 20, p99 needs 100 (about --seconds {enough_s:.0f})"
    sure = [row.runs for row in rows if row.p99_ms is not None]
    if sure:
        yield (
            f"p99 is estimated from {min(sure)} runs or more: the probability that the true p99 is"
            f" above the slowest of {min(sure)} is {0.99 ** min(sure):.0%}"
        )
    if any(row.of_macs > SUSPECT for row in rows):
        yield (
            f"!: above {SUSPECT} of the MAC ratio, more than arithmetic explains: noise, or"
            " data that exceeds a cache at full size"
        )


def format_suggestion(
    found: Suggestion, count: int, backend: str, swept: bool, seconds: float
) -> Iterator[str]:
    """Format suggested tiers as flags, after a line on how they were chosen.

    count: tiers asked for. seconds: the command's --seconds.
    """
    if not swept:
        yield (
            f"suggested tiers, from the bundle's own: {backend} has one graph per tier and runs no"
            " other keep ratios"
        )
    elif found.noise is None:
        enough_s = seconds * (1 + keep_ratios.MIN_ROUNDS) / (1 + found.rounds)
        yield (
            f"suggested tiers, evenly spaced in log latency: {found.rounds} rounds of"
            f" {len(found.seconds)} keep ratios are too few to distinguish steps from noise (about"
            f" --seconds {enough_s:.0f} would do)"
        )
    elif not found.steps:
        yield (
            f"suggested tiers, evenly spaced in log latency: over {len(found.seconds)} keep ratios"
            f" no step exceeds the trend and the noise ({found.noise:.1%})"
        )
    else:
        steps = ", ".join(f"{found.keep_ratios[i]:g}" for i in found.steps)
        yield (
            "suggested tiers, each at the upper edge of its step: the latency jumps above keep"
            f" ratio {steps} (noise {found.noise:.1%})"
        )
    width = max(len(tier.flag) for tier in found.tiers)
    for tier in found.tiers:
        step = "  just below a step" if tier.below_step else ""
        yield f"  {tier.flag:<{width}}  {1e3 * tier.seconds:8.2f} ms{step}"
    if len(found.tiers) < count:
        yield f"  {len(found.tiers)} of {count}: other ratios take the same time on this machine"


def _keep(profile: latency_profile.Profile, cache_dir: Path) -> Path:
    try:
        return latency_profile.write(profile, cache_dir)
    except OSError as error:
        raise PcaeError(
            f"cannot write the profile to {cache_dir} ({error.strerror});"
            " choose another --cache-dir"
        ) from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise PcaeError(f"cannot write {path}: {error.strerror}") from None


def _draw(path: Path, bundle: Bundle, rows: Sequence[Row], machine: str) -> None:
    """Draw the smallest and the largest batch size that were timed."""
    from pcae_export.profile_chart import draw_profile  # loads matplotlib

    batches = sorted({row.batch for row in rows})
    image_ms = {
        batch: [row.image_ms for row in rows if row.batch == batch]
        for batch in dict.fromkeys((batches[0], batches[-1]))
    }
    caption = f"{machine}; n = {min(row.runs for row in rows):,} batches or more"
    chart = draw_profile(bundle.tiers, image_ms, bundle.manifest.name, caption)
    try:
        path.write_bytes(chart)
    except OSError as error:
        raise PcaeError(f"cannot write {path}: {error.strerror}") from None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _cell(ms: float | None) -> str:
    return "—" if ms is None else f"{ms:.2f}"
