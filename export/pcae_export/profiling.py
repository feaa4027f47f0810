"""pcae-export profile: time a bundle's tiers on this machine, for the server and for a person.

    take turns -> profile in the cache -> table -> ladder of budgets

Reads flags and prints; `pcae_serve.runtime.latency_profile` measures, `ladder` suggests.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import CliPositionalArg, NoDecode
from tqdm import tqdm

from pcae_export import ladder
from pcae_export.ladder import KeepRatioLadder
from pcae_serve.bundle import reader as bundles
from pcae_serve.bundle.reader import Bundle, Tier
from pcae_serve.engines import base
from pcae_serve.engines.base import Engine
from pcae_serve.errors import PcaeError
from pcae_serve.runtime import latency_profile as profiles
from pcae_serve.runtime.latency_profile import Origin, Rounds
from pcae_serve.settings import Settings

#: More tell nothing new.
MAX_ROUNDS = 1000
#: Of the time, for the ladder's sweep.
SWEEP_SHARE = 1 / 3
#: What one request waits for on an idle machine: the ladder is about that.
SWEEP_BATCH = 1
#: Engines on the elastic graph, where any token counts run; the others have a graph for each tier.
ELASTIC = {"onnxruntime", "simulated"}
#: A speed above so much of the MAC ratio needs an explanation (DESIGN section 2).
SUSPECT = 1.02

#: Peak of dense float16 on tensor cores with float32 sums, FLOP/s, by the driver's name. Sources:
#: NVIDIA's data sheets (figures with sparsity halved), for the 4090 appendix A of the white paper
#: on the Ada architecture.
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
    """Batch sizes written as one text with commas, or as numbers: each once, from the smallest.

    Raises ValueError on what is none, and without 1.
    """
    if isinstance(value, str):
        value = value.split(",")
    try:
        batches = sorted({int(size) for size in value}) if isinstance(value, Sequence) else []
    except (TypeError, ValueError):
        raise ValueError(f"batch sizes are whole numbers as 1,4,8, not {value!r}") from None
    if not batches or batches[0] != 1:
        raise ValueError("batch sizes are 1 and more, 1 among them: the others build on it")
    return tuple(batches)


class Profile(BaseModel):
    """Time every tier on this machine: the server starts from it, and budgets are proposed.

    Flags left out are as the server's own: its PCAE_* variables, PCAE_CONFIG, its defaults.
    """

    bundle: CliPositionalArg[Path] = Field(description="bundle folder")
    device: str | None = Field(None, description="auto, cpu or cuda:N")
    backend: str | None = Field(None, description="as the server's --backend")
    threads: int | None = Field(None, description="threads of one batch; 0 = one a core")
    cache_dir: Path | None = Field(None, description="where the server looks for the profile")
    batches: Annotated[tuple[int, ...], NoDecode, BeforeValidator(read_batches)] = Field(
        (1, 2, 4, 8), description="batch sizes, as 1,4,8"
    )
    seconds: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="time to measure, a third for the ladder"
    )
    ladder: int = Field(5, ge=0, description="budgets to propose; 0 = none")
    lowest: float = Field(0.3, gt=0, le=1, description="keep ratio that the ladder stands on")
    json_: Path | None = Field(
        None, alias="json", description="also write everything there, as JSON"
    )

    def cli_cmd(self) -> None:
        given = self.model_dump(
            include={"device", "backend", "threads", "cache_dir"}, exclude_none=True
        )
        settings = Settings(**given)
        if self.batches[-1] > settings.max_batch:
            raise PcaeError(
                f"--batches goes to {self.batches[-1]}, but the server's batches end at"
                f" {settings.max_batch}: see its --max-batch"
            )
        bundle = bundles.load(self.bundle)
        engine = base.configured(settings, bundle)
        sweep_s = self.seconds * SWEEP_SHARE if self.ladder else 0.0
        timed = take_turns(engine, bundle, bundle.tiers, self.batches, self.seconds - sweep_s)
        profile = profiles.summarise(bundle, engine, timed)
        rows = compare(bundle.tiers, timed, PEAKS.get(profile.origin.gpu or ""))
        print(describe(profile.origin, engine))
        print(table(rows))
        for note in notes(rows, self.batches, self.seconds):
            print(note)
        print(f"the server starts from it: {_keep(profile, settings.cache_dir)}")

        proposed = self._ladder(bundle, engine, timed, sweep_s) if self.ladder else None
        if self.json_ is not None:
            _write_json(
                self.json_,
                {
                    "profile": profile.model_dump(mode="json"),
                    "rows": [asdict(row) | {"of_macs": row.of_macs} for row in rows],
                    "ladder": None if proposed is None else asdict(proposed),
                },
            )

    def _ladder(
        self, bundle: Bundle, engine: Engine, timed: Rounds, limit_s: float
    ) -> KeepRatioLadder:
        """Propose budgets, from a sweep where the engine can run one, and print them."""
        tiers, swept = bundle.tiers, engine.name in ELASTIC
        if swept:
            tiers = ladder.sweep(bundle, self.lowest)
            timed = take_turns(engine, bundle, tiers, (SWEEP_BATCH,), limit_s)
        proposed = ladder.climb(tiers, timed[SWEEP_BATCH], self.ladder)
        print()
        print("\n".join(propose(proposed, self.ladder, engine.name, swept, self.seconds)))
        return proposed


def take_turns(
    engine: Engine, bundle: Bundle, tiers: Sequence[Tier], batches: Sequence[int], limit_s: float
) -> Rounds:
    """As `profile.take_turns`, with a progress bar over the seconds."""
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"
    with tqdm(total=limit_s, desc="timing", bar_format=bar_format, leave=False) as bar:

        def progress(elapsed_s: float) -> None:
            bar.update(min(elapsed_s, limit_s) - bar.n)

        return profiles.take_turns(
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
    """One tier at one batch size; times are of one batch."""

    tier: str
    batch: int
    runs: int
    p50_ms: float
    p95_ms: float | None
    p99_ms: float | None
    image_ms: float
    images_per_s: float
    speed: float  # the costliest tier's time over this one's in the same round, median of rounds
    speed_low: float  # its quartiles
    speed_high: float
    mac_ratio: float  # the costliest tier's MACs over this one's
    peak_share: float | None  # of the GPU's arithmetic, where its peak is known

    @property
    def of_macs(self) -> float:
        """How much of the MAC ratio is had in time."""
        return self.speed / self.mac_ratio


def compare(tiers: Sequence[Tier], rounds: Rounds, peak: float | None) -> list[Row]:
    """A row for every (batch, tier). peak: of the GPU, in FLOP/s."""
    rows = []
    for batch, seconds in rounds.items():
        ratios = seconds[:, -1:] / seconds  # [rounds, tiers]
        for i, tier in enumerate(tiers):
            point = profiles.point(batch, seconds[:, i])
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
    """What the figures were taken on, in one line."""
    where = f"{origin.gpu}, beside " if origin.gpu else ""
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return (
        f"{where}{origin.processor or 'unknown processor'}, {origin.cores} cores,"
        f" {origin.memory_gb:g} GB; {engine.name} on {engine.device},"
        f" threads of one batch: {origin.threads or 'one a core'};"
        f" {versions}; {origin.date:%Y-%m-%d %H:%M} UTC"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text; a share of peak only where it is known."""
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


def notes(rows: Sequence[Row], batches: Sequence[int], seconds: float) -> Iterator[str]:
    """What a reader of the table must know to believe neither too much nor too little."""
    missing = [str(batch) for batch in batches if batch not in {row.batch for row in rows}]
    if missing:
        yield f"batch {', '.join(missing)}: not one round fitted into the time: more --seconds"
    runs = [row.runs for row in rows]
    if any(row.p99_ms is None for row in rows):
        enough_s = seconds * 101 / (1 + min(runs))
        yield f"—: too few runs; p95 takes 20, p99 takes 100 (about --seconds {enough_s:.0f})"
    sure = [row.runs for row in rows if row.p99_ms is not None]
    if sure:
        yield (
            f"p99 rests on {min(sure)} runs or more: the chance that the true one lies above the"
            f" slowest of {min(sure)} is {0.99 ** min(sure):.0%}"
        )
    if any(row.of_macs > SUSPECT for row in rows):
        yield (
            f"!: above {SUSPECT} of the MAC ratio, more than the arithmetic saves: find out why"
            " (noise? memory that overflows a cache at full size?)"
        )


def propose(
    found: KeepRatioLadder, asked: int, backend: str, swept: bool, seconds: float
) -> Iterator[str]:
    """The ladder as flags, and what it rests on. seconds: that the command was given."""
    if not swept:
        yield f"ladder, among the bundle's tiers: {backend} has a graph for each, and runs no other"
    elif found.noise is None:
        enough_s = seconds * (1 + ladder.MIN_ROUNDS) / (1 + found.rounds)
        yield (
            f"ladder, evenly spaced in log latency: {found.rounds} rounds of {len(found.seconds)}"
            f" budgets are too few to tell steps from noise (about --seconds {enough_s:.0f})"
        )
    elif not found.edges:
        yield (
            f"ladder, evenly spaced in log latency: over {len(found.seconds)} budgets no step"
            f" stands out of the trend and the noise ({found.noise:.1%})"
        )
    else:
        steps = ", ".join(f"{found.keep_ratios[i]:g}" for i in found.edges)
        yield (
            f"ladder, each rung at the edge of its step: the latency jumps above keep ratio {steps}"
            f" (noise {found.noise:.1%})"
        )
    width = max(len(rung.flag) for rung in found.rungs)
    for rung in found.rungs:
        edge = "  just below a step" if rung.below_step else ""
        yield f"  {rung.flag:<{width}}  {1e3 * rung.seconds:8.2f} ms{edge}"
    if len(found.rungs) < asked:
        yield f"  {len(found.rungs)} of {asked}: this machine tells no more apart"


def _keep(profile: profiles.Profile, cache_dir: Path) -> Path:
    try:
        return profiles.write(profile, cache_dir)
    except OSError as error:
        raise PcaeError(
            f"the profile cannot be kept in {cache_dir} ({error.strerror}):"
            " choose another --cache-dir"
        ) from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise PcaeError(f"{path} cannot be written: {error.strerror}") from None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _cell(ms: float | None) -> str:
    return "—" if ms is None else f"{ms:.2f}"
