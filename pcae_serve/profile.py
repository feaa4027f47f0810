"""A machine's latency profile: measured once per bundle, engine and machine, kept in the cache.

It runs an engine and reads a clock; what the numbers are used for is the latency model's business.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pcae_serve.bundle import Bundle
from pcae_serve.engines import Engine
from pcae_serve.latency import Latency, Line

log = logging.getLogger(__name__)

#: Few sizes: a line goes through them, and running batches refine it.
BATCHES = (1, 4, 8)
MOST_RUNS = 15


class Point(BaseModel):
    """Seconds of one (tier, batch)."""

    model_config = ConfigDict(frozen=True)

    batch: int
    runs: int
    median_s: float
    p95_s: float


class Profile(BaseModel):
    """What was measured, with what it was measured on."""

    model_config = ConfigDict(frozen=True)

    key: dict[str, str]
    points: dict[str, list[Point]]  # by tier name

    def latency(self) -> Latency:
        """The latency model that starts from these points."""
        lines = [
            Line.through({point.batch: point.median_s for point in points})
            for points in self.points.values()
        ]
        ratios = [p.p95_s / p.median_s for points in self.points.values() for p in points]
        return Latency(lines, spread=float(np.clip(median(ratios), 1.05, 2.0)))


def measure(
    bundle: Bundle, engine: Engine, limit_s: float, clock: Callable[[], float] = time.perf_counter
) -> Profile:
    """Run every tier at a few batch sizes within about `limit_s`; a batch of one is always run.

    Tiers take turns, so that a slow moment of a shared machine does not fall on one of them.
    """
    size, start = bundle.image_size, clock()
    noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), np.uint8)
    samples: dict[tuple[str, int], list[float]] = {}
    for tier in bundle.tiers:
        engine.run(tier, noise[:1])  # warm-up: the first run allocates
    for turn in range(MOST_RUNS):
        for batch in BATCHES:
            for tier in bundle.tiers:
                known = samples.setdefault((tier.name, batch), [])
                needed = known[-1] if known else batch * min(samples[tier.name, 1], default=0.0)
                if (turn or batch > 1) and clock() - start + needed > limit_s:
                    continue
                begin = clock()
                engine.run(tier, noise[:batch])
                known.append(clock() - begin)
    points = {
        tier.name: [
            Point(batch=batch, runs=len(runs), median_s=median(runs), p95_s=_p95(runs))
            for batch in BATCHES
            if (runs := samples[tier.name, batch])
        ]
        for tier in bundle.tiers
    }
    return Profile(key=key(bundle, engine), points=points)


def load(bundle: Bundle, engine: Engine, cache_dir: Path, limit_s: float) -> Profile:
    """This machine's profile from the cache, or measured now and put there."""
    wanted = key(bundle, engine)
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir / "profiles" / f"{name}.json"
    try:
        profile = Profile.model_validate_json(path.read_bytes())
        if profile.key == wanted and set(profile.points) == {t.name for t in bundle.tiers}:
            return profile
    except (OSError, ValidationError):
        pass  # none yet, or damaged: measured anew and replaced
    profile = measure(bundle, engine, limit_s)
    try:
        _write(path, profile.model_dump_json(indent=1))
    except OSError as error:
        log.warning("cannot keep the latency profile in %s: %s", cache_dir, error.strerror)
    return profile


def key(bundle: Bundle, engine: Engine) -> dict[str, str]:
    """What a profile is valid for."""
    return {
        "bundle": bundle.digest,
        "engine": f"{engine.name} {engine.version}",
        "device": engine.device,
        "machine": f"{platform.machine()} {processor()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(engine.threads),
    }


def processor() -> str:
    """The processor's name, as its maker gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _p95(runs: list[float]) -> float:
    return quantiles(runs, n=20, method="inclusive")[-1] if len(runs) > 1 else runs[0]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
