"""Latency profiles: measured once per bundle, engine and machine, and cached.

take_turns   time the engine                  -> seconds [rounds, tiers] by batch size
summarise    reduce those to quantiles        -> Profile
load         return the cached profile if it still holds, otherwise measure a short one
"""

import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pcae_serve import atomic
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import cpus, nvidia
from pcae_serve.engines.base import Engine
from pcae_serve.errors import StartError
from pcae_serve.frozen_model import FrozenModel
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.settings import MAX_BATCH
from pcae_serve.version import __version__

log = logging.getLogger(__name__)

#: Batch sizes of the short measurement: a line is fitted, and real batches refine it later.
BATCHES = (1, 4, 8)
#: Maximum rounds of the short measurement.
MAX_ROUNDS = 15

#: Bounds for the ratio of p95 to median; few rounds on a busy machine can give any value.
SPREADS = (1.05, 2.0)
#: log(p99 / p50) over log(p95 / p50) of a log-normal: 2.326 / 1.645 standard deviations.
P99_FROM_P95 = 1.414

#: A cached profile is measured again if a check differs from it by more than this factor.
MAX_OFF = 1.5

#: Seconds of one batch, [rounds, tiers], by batch size.
Rounds = Mapping[int, NDArray[np.float64]]


class Point(FrozenModel):
    """Seconds of one (tier, batch). A quantile is None if there are too few runs for it."""

    batch: int
    runs: int
    p50_s: float
    p95_s: float | None  # of at least 20 runs
    p99_s: float | None  # of at least 100 runs


class Origin(FrozenModel):
    """Where and when a profile was measured, for display; its key defines what it is valid for."""

    date: datetime
    processor: str
    gpu: str | None  # if the engine runs on one
    cores: int
    memory_gb: float
    threads: int  # of one batch; 0 = the backend's own choice
    versions: dict[str, str]


class Profile(FrozenModel):
    """Measured latencies, and the machine that they were measured on."""

    key: dict[str, str]
    origin: Origin
    spread: float  # p95 of run time over the median of its (tier, batch), over all runs
    points: dict[str, list[Point]]  # by tier name

    def latency(self, max_batch: int = MAX_BATCH) -> Latency:
        """Return a latency model that starts from these points."""
        return Latency(self.seconds(), max_batch)

    def seconds(self) -> list[dict[int, Seconds]]:
        """Return median and p99 by batch size, for each tier in the bundle's order."""
        return [
            {point.batch: Seconds(point.p50_s, self._p99_s(point)) for point in points}
            for points in self.points.values()
        ]

    def _p99_s(self, point: Point) -> float:
        """Return the measured p99, or one extrapolated from the p95 of a log-normal."""
        if point.p99_s is not None:
            return point.p99_s
        over_median = self.spread if point.p95_s is None else point.p95_s / point.p50_s
        return float(point.p50_s * np.clip(over_median, *SPREADS) ** P99_FROM_P95)


def take_turns(
    engine: Engine,
    tiers: Sequence[Tier],
    batches: Sequence[int],
    image_size: int,
    limit_s: float,
    *,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] = lambda elapsed_s: None,
) -> Rounds:
    """Measure the seconds of one batch, [rounds, tiers] by batch size, within about `limit_s`.

    A round runs every tier once at one batch size, in random order, so that a slow phase of a
    shared machine affects all tiers. A round that would exceed the limit is not started, but two
    rounds of the smallest batch always run. The first round warms up (memory allocation, clock
    rates) and counts only if there is no second; a batch size without any round is left out.
    progress: called after every run with the elapsed seconds.
    """
    draw, smallest = np.random.default_rng(0), min(batches)
    noise = draw.integers(0, 256, (max(batches), image_size, image_size, 3), np.uint8)
    start_s = clock()
    rounds: dict[int, list[NDArray[np.float64]]] = {batch: [] for batch in sorted(batches)}
    for turn in range(1 + max_rounds):
        begun = False
        for batch, known in rounds.items():
            if batch > smallest or turn > 1:
                known_s = known[-1] if known else rounds[smallest][-1] * batch / smallest
                if clock() - start_s + known_s.sum() > limit_s:
                    continue
            begun = True
            seconds = np.empty(len(tiers))
            for i in draw.permutation(len(tiers)):
                begin_s = clock()
                engine.run(tiers[i], noise[:batch])
                seconds[i] = clock() - begin_s
                progress(clock() - start_s)
            known.append(seconds)
        if not begun:
            break
    return {batch: np.stack(known[1:] or known) for batch, known in rounds.items() if known}


def summarise(bundle: Bundle, engine: Engine, rounds: Rounds) -> Profile:
    """Return the profile of measured rounds over the bundle's tiers."""
    points = {
        tier.name: [point(batch, seconds[:, i]) for batch, seconds in rounds.items()]
        for i, tier in enumerate(bundle.tiers)
    }
    over_median = [(s / np.median(s, axis=0)).ravel() for s in rounds.values()]
    return Profile(
        key=key(bundle, engine),
        origin=origin(engine),
        spread=float(np.quantile(np.concatenate(over_median), 0.95)),
        points=points,
    )


def point(batch: int, seconds: NDArray[np.float64]) -> Point:
    """Return the quantiles of the runs of one (tier, batch)."""
    return Point(
        batch=batch,
        runs=len(seconds),
        p50_s=float(np.median(seconds)),
        p95_s=_quantile(seconds, 95),
        p99_s=_quantile(seconds, 99),
    )


def load(
    bundle: Bundle,
    engine: Engine,
    cache_dir: Path,
    limit_s: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Return the cached profile of this machine, or measure a short one and cache it.

    A cached profile is checked first and replaced if it is off: its key cannot show that a
    processor is shared, throttled, or a different one of the same name. clock: seconds of compute.
    """
    cached = read(bundle, engine, cache_dir)
    if cached is not None:
        off = slowdown(cached, bundle, engine, clock)
        if 1 / MAX_OFF <= off <= MAX_OFF:
            return cached
        log.warning(
            "the latency profile of %s is out of date (batches take %.2f times as long)",
            f"{cached.origin.date:%Y-%m-%d %H:%M}",
            off,
        )
    log.info(
        "measuring latencies of %d tiers on %s, up to %g s; cached afterwards in %s",
        len(bundle.tiers),
        engine.device,
        limit_s,
        cache_dir,
    )
    rounds = take_turns(engine, bundle.tiers, BATCHES, bundle.image_size, limit_s, clock=clock)
    better = read(bundle, engine, cache_dir)  # perhaps written by `pcae-export profile` meanwhile
    if better is not None and better != cached:
        return better
    measured = summarise(bundle, engine, rounds)
    try:
        write(measured, cache_dir)
    except OSError as error:
        log.warning("cannot cache the latency profile in %s: %s", cache_dir, error.strerror)
    return measured


def slowdown(profile: Profile, bundle: Bundle, engine: Engine, clock: Callable[[], float]) -> float:
    """Return the ratio of actual to profiled latency of one image, as the median over tiers.

    Each tier runs twice and its faster run counts: the first one warms up, and one slow run does
    not disprove a profile.
    """
    size = bundle.image_size
    noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    fastest_s = np.full(len(bundle.tiers), np.inf)
    for _ in range(2):
        for i, tier in enumerate(bundle.tiers):
            begin_s = clock()
            engine.run(tier, noise)
            fastest_s[i] = min(fastest_s[i], clock() - begin_s)
    latency = profile.latency(max_batch=1)
    profiled_s = [latency.forecast(0.0).p50(i, 1) for i in range(len(bundle.tiers))]
    return float(np.median(fastest_s / profiled_s))


def read(bundle: Bundle, engine: Engine, cache_dir: Path) -> Profile | None:
    """Return the cached profile, or None if it is missing, damaged or has another key."""
    wanted = key(bundle, engine)
    try:
        profile = Profile.model_validate_json(path(wanted, cache_dir).read_bytes())
    except (OSError, ValidationError):
        return None
    fits = profile.key == wanted and set(profile.points) == {t.name for t in bundle.tiers}
    return profile if fits and all(profile.points.values()) else None


def write(profile: Profile, cache_dir: Path) -> Path:
    """Write the profile to the cache, atomically. Raises OSError."""
    place = path(profile.key, cache_dir)
    atomic.write_file(place, profile.model_dump_json(indent=1).encode())
    return place


def path(key: Mapping[str, str], cache_dir: Path) -> Path:
    """Return the cache file of the profile with that key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir / "profiles" / f"{name}.json"


def key(bundle: Bundle, engine: Engine) -> dict[str, str]:
    """Return the properties of bundle, engine and machine that a profile is valid for."""
    return {
        "bundle": bundle.digest,
        "engine": f"{engine.name} {engine.version}",
        "device": " ".join(filter(None, (engine.device.partition(" ")[0], gpu(engine)))),
        "machine": f"{platform.machine()} {processor()}",
        "cores": str(cpus.count_usable()),
        "threads": str(engine.threads),
    }


def origin(engine: Engine) -> Origin:
    """Return a description of this machine, with the current time."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Origin(
        date=datetime.now(UTC),
        processor=processor(),
        gpu=gpu(engine),
        cores=cpus.count_usable(),
        memory_gb=round(memory / 1e9, 1),
        threads=engine.threads,
        versions={
            "pcae-serve": __version__,
            engine.name: engine.version,
            "python": platform.python_version(),
        },
    )


def gpu(engine: Engine) -> str | None:
    """Return the name of the engine's GPU; None on a CPU, or if no driver reports it."""
    found = re.match(r"cuda:(\d+)", engine.device)
    try:
        return nvidia.list_gpus()[int(found[1])] if found else None
    except (StartError, IndexError):  # the simulated engine runs without a GPU
        return None


def processor() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _quantile(seconds: NDArray[np.float64], percent: int) -> float | None:
    """Return a quantile, or None if there are too few runs to estimate it."""
    if len(seconds) * (100 - percent) < 100:
        return None
    return float(np.quantile(seconds, percent / 100))
