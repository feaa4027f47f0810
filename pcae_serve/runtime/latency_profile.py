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

from pcae_serve import atomic
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import cpus, nvidia
from pcae_serve.engines.base import Engine
from pcae_serve.errors import StartError
from pcae_serve.runtime.measured_profile import Origin as Origin
from pcae_serve.runtime.measured_profile import Point as Point
from pcae_serve.runtime.measured_profile import Profile as Profile
from pcae_serve.runtime.measured_profile import read_profile
from pcae_serve.version import __version__

log = logging.getLogger(__name__)

#: Batch sizes of the short measurement: a line is fitted, and real batches refine it later.
BATCHES = (1, 4, 8)
#: Maximum rounds of the short measurement.
MAX_ROUNDS = 15

#: A cached profile is measured again if a check differs from it by more than this factor.
MAX_OFF = 1.5

#: Seconds of one batch, [rounds, tiers], by batch size.
Rounds = Mapping[int, NDArray[np.float64]]


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
    try:
        cached = _read(bundle, engine, cache_dir)
    except ValueError as error:
        log.warning("the cached latency profile is not usable, so it is measured again: %s", error)
        cached = None
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
    """Return the cached profile, or None if it is missing or not usable."""
    try:
        return _read(bundle, engine, cache_dir)
    except ValueError:
        return None


def _read(bundle: Bundle, engine: Engine, cache_dir: Path) -> Profile | None:
    """Return the cached profile, or None if there is none. Raise ValueError if it is not usable."""
    wanted = key(bundle, engine)
    place = path(wanted, cache_dir)
    try:
        profile = read_profile(place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{place}: {error.strerror}") from None
    if profile.key != wanted or set(profile.points) != {tier.name for tier in bundle.tiers}:
        raise ValueError(f"{place}: it describes another bundle, engine or machine")
    return profile


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
