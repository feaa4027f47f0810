"""Workloads: when requests arrive and the budget of each, drawn from a seed or read from a file.

    WorkloadFlags   the flags that `simulate` and `replay` share
    make            a trace at a rate, with budgets from a mix

Times and budgets are whole microseconds, so that a saved workload is loaded bit for bit.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from pcae_serve.bounded_file import read_bounded
from pcae_serve.errors import StartError, one_line

Seconds: TypeAlias = NDArray[np.float64]
Count = Annotated[int, Field(ge=1)]

TRACES = ("azure-code", "poisson", "gamma-2", "gamma-4", "gamma-8", "ramp", "flash")
#: (budget in multiples of the full tier's latency at batch 1, share of requests).
MIXES: dict[str, tuple[tuple[float, float], ...]] = {
    "mixed": ((3, 0.3), (8, 0.5), (50, 0.2)),
    "single": ((8, 1.0),),
    "loose": ((8, 0.5), (50, 0.5)),
}

#: A longer gap in the recorded trace is a silence; it is replaced by the median gap.
SILENCE_S = 10.0
#: The ramp's first and last rate, in multiples of the mean.
RAMP = (0.2, 1.8)
#: Rate during the flash relative to the rate around it, and the flash's share of the time span.
FLASH, FLASH_SHARE = 4.0, 0.1
#: Rate during the flash, in multiples of the mean: 3.08.
FLASH_PEAK = FLASH / (1 + (FLASH - 1) * FLASH_SHARE)

HEADER = "arrival_s,budget_ms"
#: Size of a trace file, and its times: statistics keep a number for each second.
MAX_TRACE_BYTES = 200_000_000
MAX_TIME_S = 1e7


class WorkloadFlags(BaseModel):
    """Flags that choose the workload; commands add to them and describe load and rate."""

    trace: list[str] = Field(
        ["azure-code"],
        description=f"arrivals: {', '.join(TRACES)}, or a .csv file with arrival_s[,budget_ms];"
        " comma-separated or repeated; all: every named trace",
    )
    load: list[float] | None
    rate: list[float] | None
    mix: str = Field(
        "mixed",
        description=f"budgets: {', '.join(MIXES)}, or multiples of the last tier's batch-1 latency"
        " with shares, such as 3:0.3,8:0.7",
    )
    requests: Count
    seeds: Count

    def traces(self) -> list[str]:
        """Return the names, each once. Raise StartError if a trace or the mix is not usable."""
        parse_mix(self.mix)
        names = [name for word in self.trace for name in (TRACES if word == "all" else (word,))]
        for name in names:  # an unreadable file is reported before any other trace is played
            make(name, "8", None if name.endswith(".csv") else 1.0, 2, 1.0, 0)
        return list(dict.fromkeys(names))

    def rates(
        self, trace: str, capacity_per_s: float | None, default_loads: Sequence[float] = ()
    ) -> list[float | None]:
        """Return the rates to play a trace at, in requests per second; None: as recorded.

        Loads are multiples of the capacity, which must be known if any load applies.
        """
        if self.rate:
            return list(self.rate)
        if trace.endswith(".csv") and not self.load:
            return [None]
        assert capacity_per_s is not None
        return [load * capacity_per_s for load in self.load or default_loads]

    @field_validator("load", "rate")
    @classmethod
    def _positive(cls, given: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if given is not None and not all(0 < value < inf for value in given):
            raise ValueError(f"--{info.field_name}: every value must be a number above 0")
        return given

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if self.load and self.rate:
            raise ValueError("--load and --rate are mutually exclusive")
        return self


@dataclass(frozen=True, eq=False)
class Workload:
    """Request i arrives at times_s[i], the first at 0, and has the budget budgets_s[i]."""

    times_s: Seconds  # [N], ascending
    budgets_s: Seconds  # [N], positive

    def save(self, path: Path) -> None:
        """Write the CSV file that `load` reads, one request a line."""
        rows = zip(self.times_s.tolist(), self.budgets_s.tolist(), strict=True)
        lines = [f"{time:.6f},{1e3 * budget:.3f}\n" for time, budget in rows]
        path.write_text(f"{HEADER}\n{''.join(lines)}", encoding="utf-8")


def make(
    trace: str, mix: str, rate: float | None, count: int, full_s: float, seed: int
) -> Workload:
    """Return `count` requests of a trace, with budgets from the mix.

    `trace` is one of TRACES, or the path of a .csv file with the column `arrival_s` and optionally
    `budget_ms`. From a file, the first `count` requests are taken, or all if it has fewer; they
    arrive at `rate` requests per second, or as recorded if rate is None. Budgets in a file are used
    unchanged. `full_s` is the full tier's latency at batch 1, the unit of the mix.
    """
    if not trace.endswith(".csv"):
        if rate is None:
            raise StartError(f"trace {trace!r} needs a rate in requests per second")
        return Workload(arrivals(trace, rate, count, seed), budgets(mix, full_s, count, seed))
    times_s, budgets_s = _read(Path(trace))
    times_s = times_s[: _checked_count(count)]
    if rate is not None:
        times_s = _scale_to_rate(times_s, rate)
    if budgets_s is None:
        budgets_s = budgets(mix, full_s, len(times_s), seed)
    return Workload(times_s, budgets_s[: len(times_s)])


def load(path: Path) -> Workload:
    """Read a workload from a CSV file with both columns, as `save` writes it."""
    times_s, budgets_s = _read(path)
    if budgets_s is None:
        raise StartError(f"{path}, line 1: no column budget_ms; the header must be {HEADER}")
    return Workload(times_s, budgets_s)


def arrivals(trace: str, rate: float, count: int, seed: int) -> Seconds:
    """Return `count` arrival times [count], the first at 0; a seed gives the same on every machine.

    Each trace has exactly the mean `rate`: (count - 1) gaps in (count - 1) / rate seconds. Traces
    of one rate thus carry the same load; seeds differ only in how it is distributed over time.

    - poisson: independent requests.
    - gamma-N: gaps from a Gamma distribution whose squared coefficient of variation is N.
    - ramp: Poisson, from 0.2 to 1.8 times the mean rate, linearly.
    - flash: Poisson; the middle tenth of the time has 4 times the rate of the rest. The rate is
      0.77 of the mean outside the flash, FLASH_PEAK of it inside.
    - azure-code: consecutive requests of the recorded trace from a position that the seed picks,
      wrapping around at the end, with time scaled to the rate. Its 45 gaps over SILENCE_S are
      replaced by the median gap. The gaps have a CV² of 9.0 over the whole trace and of 4 to 13
      over 2,000 requests: use several seeds.
    """
    count = _checked_count(count)
    random = _generator(seed, stream=0)
    gaps = count - 1
    if trace == "azure-code":
        recorded = _recorded_gaps()
        start = int(random.integers(len(recorded)))
        return _scale_to_rate(
            _times_from_gaps(recorded.take(range(start, start + gaps), mode="wrap")), rate
        )
    if trace not in TRACES:
        names = ", ".join(TRACES)
        raise StartError(f"unknown trace {trace!r}; use {names} or the path of a .csv file")
    if trace.startswith("gamma-"):
        return _scale_to_rate(
            _times_from_gaps(random.standard_gamma(1 / float(trace[6:]), gaps)), rate
        )
    times = _times_from_gaps(random.standard_exponential(gaps))
    # [count], share of the requests so far -> share of the span so far
    load = times / max(times[-1], np.finfo(float).tiny)
    if trace == "ramp":  # solves load = first * t + (last - first) / 2 * t**2
        first, slope = RAMP[0], RAMP[1] - RAMP[0]
        times = (np.sqrt(first**2 + 2 * slope * load) - first) / slope
    elif trace == "flash":
        inside = FLASH_PEAK * FLASH_SHARE  # share of the requests
        loads, spans = ([0, 0.5 - part / 2, 0.5 + part / 2, 1] for part in (inside, FLASH_SHARE))
        times = np.interp(load, loads, spans)
    return _scale_to_rate(times, rate)


def budgets(mix: str, full_s: float, count: int, seed: int) -> Seconds:
    """Return `count` budgets in seconds, drawn independently of the arrivals."""
    multiples, shares = np.array(parse_mix(mix), dtype=np.float64).T
    drawn = _generator(seed, stream=1).choice(multiples, _checked_count(count), p=shares)
    return np.maximum(_microseconds(drawn * full_s), 1e-6)


def parse_mix(mix: str) -> tuple[tuple[float, float], ...]:
    """Return (multiple of the full tier's latency, share) for a name of MIXES or a description.

    A description is "3:0.3,8:0.5,50:0.2", or "8" for one budget; an omitted share is 1. Shares are
    normalised to a sum of 1.
    """
    parts: Iterable[tuple[float, float]] = MIXES.get(mix, ())
    if not parts:
        try:
            split = [part.partition(":") for part in mix.split(",")]
            parts = [(float(times), float(share) if colon else 1) for times, colon, share in split]
        except ValueError:
            raise StartError(
                f"unknown mix {mix!r}; use {', '.join(MIXES)} or multiples of the full tier's"
                " latency with shares, such as 3:0.3,8:0.5,50:0.2"
            ) from None
    if not all(0 < number < inf for part in parts for number in part):
        raise StartError(f"mix {mix!r}: each multiple and each share must be a number above 0")
    total = sum(share for _, share in parts)
    return tuple((float(times), share / total) for times, share in parts)


@dataclass(frozen=True)
class Statistics:
    """Burstiness of a trace; `gap_cv2` and `dispersion` of a Poisson process are 1."""

    rate: float  # requests per second, mean
    gap_cv2: float  # variance of the gaps over their squared mean
    dispersion: float  # variance over mean of the counts in full windows; 0 if there is only one
    peak: float  # requests per second in the busiest window


def statistics(times_s: Seconds, window_s: float = 1.0) -> Statistics:
    """Return the statistics of ascending times, in adjacent windows from the first request."""
    gaps = np.diff(times_s)  # [N - 1]
    if not gaps.sum() > 0:
        raise StartError("a trace needs requests at two different times to have a rate")
    counts = np.bincount(((times_s - times_s[0]) / window_s).astype(np.int64))
    full = counts[:-1] if len(counts) > 1 else counts  # the last window is incomplete
    return Statistics(
        rate=float(1 / gaps.mean()),
        gap_cv2=float(gaps.var() / gaps.mean() ** 2),
        dispersion=float(full.var() / full.mean()),
        peak=float(counts.max() / window_s),
    )


def _read(path: Path) -> tuple[Seconds, Seconds | None]:
    """Return times from the first request on, and budgets if the file has that column."""
    try:
        text = read_bounded(path, MAX_TRACE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise StartError(f"cannot read the trace {path}: {one_line(error)}") from None
    header, *lines = text.splitlines() or [""]
    columns = re.sub(r"[\s\"]", "", header).split(",")
    if columns not in (["arrival_s"], HEADER.split(",")):
        raise StartError(f"{path}, line 1: the header must be {HEADER} or arrival_s")
    rows: list[list[float]] = []
    latest = -inf
    for number, line in enumerate(lines, start=2):
        try:
            row = [float(cell) for cell in line.split(",")]
        except ValueError:
            row = []
        if len(row) != len(columns) or not all(map(isfinite, row)):
            expected = "a finite number" if len(columns) == 1 else "two finite numbers"
            raise StartError(f"{path}, line {number}: {line[:40]!r} must be {expected}")
        if row[0] < latest:
            raise StartError(f"{path}, line {number}: earlier than the line above; sort by time")
        if abs(row[0]) > MAX_TIME_S:
            raise StartError(f"{path}, line {number}: times are limited to {MAX_TIME_S:g} s")
        if len(row) > 1 and row[1] < 0.001:
            raise StartError(f"{path}, line {number}: a budget must be at least 0.001 ms")
        latest = row[0]
        rows.append(row)
    if not rows:
        raise StartError(f"{path} contains no requests")
    table = np.array(rows).T  # [columns, N]
    times_s = _microseconds(table[0] - table[0, 0])
    return times_s, _microseconds(table[1] / 1e3) if len(table) > 1 else None


@cache
def _recorded_gaps() -> Seconds:
    """Return the gaps of the recorded trace, each silence replaced by the median gap."""
    text = (files("pcae_serve.loadtest") / "traces" / "azure_llm_code.txt").read_text(
        encoding="utf-8"
    )
    gaps = np.diff(np.array(text.split(), dtype=np.float64))
    return np.where(gaps > SILENCE_S, np.median(gaps), gaps)


def _times_from_gaps(gaps: Seconds) -> Seconds:
    return np.concatenate(([0.0], np.cumsum(gaps)))  # [N] gaps, [N + 1] times


def _scale_to_rate(times: Seconds, rate: float) -> Seconds:
    """Return times from 0, scaled to the mean rate."""
    if not 0 < rate < inf:
        raise StartError(f"rate {rate} must be a number of requests per second above 0")
    span = times[-1] or 1.0  # one request, or all at once
    return _microseconds(times / span * ((len(times) - 1) / rate))


def _microseconds(seconds: Seconds) -> Seconds:
    return np.round(seconds, 6)


def _checked_count(count: int) -> int:
    if count < 1:
        raise StartError(f"a workload needs at least 1 request, not {count}")
    return count


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Return a generator; streams of one seed are independent, so gaps and budgets are too."""
    if seed < 0:
        raise StartError(f"seed {seed} must be 0 or more")
    return np.random.Generator(np.random.PCG64([seed, stream]))
