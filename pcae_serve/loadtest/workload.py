"""Workloads: when requests arrive and what budget each one has, from a seed or from a file.

Knows rates, shares and files. It does not know tiers, queues or what becomes of a request; the one
thing it hears of the model is the full tier's latency at batch 1, which budgets are multiples of.

Times and budgets are whole microseconds: what is saved and loaded again is the same to the bit.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import inf, isfinite
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pcae_serve.errors import StartError, one_line

Seconds: TypeAlias = NDArray[np.float64]

TRACES = ("azure-code", "poisson", "gamma-2", "gamma-4", "gamma-8", "ramp", "flash")
#: (budget in multiples of the full tier's latency at batch 1, share of requests).
MIXES: dict[str, tuple[tuple[float, float], ...]] = {
    "mixed": ((3, 0.3), (8, 0.5), (50, 0.2)),
    "single": ((8, 1.0),),
    "loose": ((8, 0.5), (50, 0.5)),
}

#: A longer gap in the recorded trace is a silence, where nobody is served and nothing is learnt.
SILENCE_S = 10.0
#: The ramp's first and last rate, in multiples of the mean.
RAMP = (0.2, 1.8)
#: How much busier the flash is than the time around it, and its share of the span.
FLASH, FLASH_SHARE = 4.0, 0.1
#: The flash's rate, in multiples of the mean: 3.08.
FLASH_PEAK = FLASH / (1 + (FLASH - 1) * FLASH_SHARE)

HEADER = "arrival_s,budget_ms"


@dataclass(frozen=True, eq=False)
class Workload:
    """Request i arrives at times_s[i], the first at 0, and has budgets_s[i] to be answered in."""

    times_s: Seconds  # [N], ascending
    budgets_s: Seconds  # [N], positive

    def save(self, path: Path) -> None:
        """As text that `load` reads, one request a line."""
        rows = zip(self.times_s.tolist(), self.budgets_s.tolist(), strict=True)
        lines = [f"{time:.6f},{1e3 * budget:.3f}\n" for time, budget in rows]
        path.write_text(f"{HEADER}\n{''.join(lines)}", encoding="utf-8")


def make(
    trace: str, mix: str, rate: float | None, count: int, full_s: float, seed: int
) -> Workload:
    """`count` requests of a trace, with budgets from the mix.

    `trace` is one of TRACES, or the path of a .csv file with the columns `arrival_s` and, if it
    likes, `budget_ms`. Of a file, the first `count` requests are played, or all where it has fewer;
    at `rate` requests a second, or as fast as recorded where rate is None. Budgets in a file stay
    as they are, whatever the mix and the rate.
    """
    if not trace.endswith(".csv"):
        if rate is None:
            raise StartError(f"the trace {trace!r} needs a rate, in requests a second")
        return Workload(arrivals(trace, rate, count, seed), budgets(mix, full_s, count, seed))
    times_s, budgets_s = _read(Path(trace))
    times_s = times_s[: _checked_count(count)]
    if rate is not None:
        times_s = _paced(times_s, rate)
    if budgets_s is None:
        budgets_s = budgets(mix, full_s, len(times_s), seed)
    return Workload(times_s, budgets_s[: len(times_s)])


def load(path: Path) -> Workload:
    """A workload that was saved, or written by hand in the same two columns."""
    times_s, budgets_s = _read(path)
    if budgets_s is None:
        raise StartError(f"{path}, line 1: no column budget_ms; the header should be {HEADER}")
    return Workload(times_s, budgets_s)


def arrivals(trace: str, rate: float, count: int, seed: int) -> Seconds:
    """Arrival times of `count` requests, the first at 0; the same for a seed on every machine.

    Over the whole, each trace has exactly the mean rate asked for: (count - 1) gaps in
    (count - 1) / rate seconds. Traces of one rate thus carry the same load, and seeds differ only
    in how it is spread.

    - poisson: independent requests.
    - gamma-N: gaps from a Gamma distribution whose squared coefficient of variation is N.
    - ramp: Poisson, from 0.2 to 1.8 times the rate in a straight line.
    - flash: Poisson, with a square wave of 4 times the rate around it in the middle tenth. `rate`
      is the mean of the whole; it is 0.77 of that outside the flash, FLASH_PEAK of it inside.
    - azure-code: consecutive requests of the recorded trace from a place that the seed picks, going
      on from its start after its end, with time stretched to the rate. Its 45 gaps over SILENCE_S
      are cut out: each becomes a median gap. Gaps have a CV² of 9.0 over the whole trace, of 4 to
      13 over 2,000 requests: a window is a stretch of one afternoon, so take several seeds.
    """
    count = _checked_count(count)
    random = _generator(seed, stream=0)
    gaps = count - 1
    if trace == "azure-code":
        recorded = _recorded_gaps()
        start = int(random.integers(len(recorded)))
        return _paced(_times(recorded.take(range(start, start + gaps), mode="wrap")), rate)
    if trace not in TRACES:
        names = ", ".join(TRACES)
        raise StartError(f"no trace {trace!r}; there are {names}, or the path of a .csv file")
    if trace.startswith("gamma-"):
        return _paced(_times(random.standard_gamma(1 / float(trace[6:]), gaps)), rate)
    times = _times(random.standard_exponential(gaps))
    # [count], share of the requests so far -> share of the span so far
    load = times / max(times[-1], np.finfo(float).tiny)
    if trace == "ramp":  # solves load = first * t + (last - first) / 2 * t**2
        first, slope = RAMP[0], RAMP[1] - RAMP[0]
        times = (np.sqrt(first**2 + 2 * slope * load) - first) / slope
    elif trace == "flash":
        inside = FLASH_PEAK * FLASH_SHARE  # share of the requests
        loads, spans = ([0, 0.5 - part / 2, 0.5 + part / 2, 1] for part in (inside, FLASH_SHARE))
        times = np.interp(load, loads, spans)
    return _paced(times, rate)


def budgets(mix: str, full_s: float, count: int, seed: int) -> Seconds:
    """Budgets of `count` requests, drawn one by one; a stream of its own, blind to the arrivals."""
    multiples, shares = np.array(parse_mix(mix), dtype=np.float64).T
    drawn = _generator(seed, stream=1).choice(multiples, _checked_count(count), p=shares)
    return np.maximum(_microseconds(drawn * full_s), 1e-6)


def parse_mix(mix: str) -> tuple[tuple[float, float], ...]:
    """(multiple of the full tier's latency, share) from a name of MIXES, or from text.

    Text is "3:0.3,8:0.5,50:0.2", or "8" for one budget; a share left out is 1. Shares are made to
    sum to one.
    """
    parts: Iterable[tuple[float, float]] = MIXES.get(mix, ())
    if not parts:
        try:
            split = [part.partition(":") for part in mix.split(",")]
            parts = [(float(times), float(share) if colon else 1) for times, colon, share in split]
        except ValueError:
            raise StartError(
                f"no mix {mix!r}; there are {', '.join(MIXES)}, or multiples of the full tier's "
                "latency and their shares, such as 3:0.3,8:0.5,50:0.2"
            ) from None
    if not all(0 < number < inf for part in parts for number in part):
        raise StartError(f"mix {mix!r}: each multiple and each share must be a number above 0")
    whole = sum(share for _, share in parts)
    return tuple((float(times), share / whole) for times, share in parts)


@dataclass(frozen=True)
class Statistics:
    """How bursty a trace is; a Poisson process has 1 in the middle two."""

    rate: float  # requests a second over the whole
    gap_cv2: float  # variance of the gaps over their squared mean
    dispersion: float  # variance over mean of the counts in whole windows; 0 where there is but one
    peak: float  # requests a second in the busiest window


def statistics(times_s: Seconds, window_s: float = 1.0) -> Statistics:
    """Of ascending times; the windows are laid end to end from the first request."""
    gaps = np.diff(times_s)  # [N - 1]
    if not gaps.sum() > 0:
        raise StartError("a trace needs requests at two different times to have a rate")
    counts = np.bincount(((times_s - times_s[0]) / window_s).astype(np.int64))
    whole = counts[:-1] if len(counts) > 1 else counts  # the last window is cut short
    return Statistics(
        rate=float(1 / gaps.mean()),
        gap_cv2=float(gaps.var() / gaps.mean() ** 2),
        dispersion=float(whole.var() / whole.mean()),
        peak=float(counts.max() / window_s),
    )


def _read(path: Path) -> tuple[Seconds, Seconds | None]:
    """Times from the first request on, and budgets if the file has the column."""
    try:
        header, *lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
    except (OSError, UnicodeError) as error:
        raise StartError(f"cannot read the trace {path}: {one_line(error)}") from None
    columns = re.sub(r"[\s\"]", "", header).split(",")
    if columns not in (["arrival_s"], HEADER.split(",")):
        raise StartError(f"{path}, line 1: the header should be {HEADER}, or arrival_s alone")
    rows: list[list[float]] = []
    latest = -inf
    for number, line in enumerate(lines, start=2):
        try:
            row = [float(cell) for cell in line.split(",")]
        except ValueError:
            row = []
        if len(row) != len(columns) or not all(map(isfinite, row)):
            wanted = "a finite number" if len(columns) == 1 else "two finite numbers"
            raise StartError(f"{path}, line {number}: {line[:40]!r} should be {wanted}")
        if row[0] < latest:
            raise StartError(f"{path}, line {number}: arrives before the line above; sort by time")
        if len(row) > 1 and row[1] < 0.001:
            raise StartError(f"{path}, line {number}: a budget must be at least 0.001 ms")
        latest = row[0]
        rows.append(row)
    if not rows:
        raise StartError(f"{path} holds no request")
    table = np.array(rows).T  # [columns, N]
    times_s = _microseconds(table[0] - table[0, 0])
    return times_s, _microseconds(table[1] / 1e3) if len(table) > 1 else None


@cache
def _recorded_gaps() -> Seconds:
    """Gaps of the recorded trace, each silence cut down to the median gap."""
    text = (files("pcae_serve.loadtest") / "traces" / "azure_llm_code.txt").read_text(
        encoding="utf-8"
    )
    gaps = np.diff(np.array(text.split(), dtype=np.float64))
    return np.where(gaps > SILENCE_S, np.median(gaps), gaps)


def _times(gaps: Seconds) -> Seconds:
    return np.concatenate(([0.0], np.cumsum(gaps)))  # [N] gaps, [N + 1] times


def _paced(times: Seconds, rate: float) -> Seconds:
    """Times that begin at 0, stretched to the mean rate."""
    if not 0 < rate < inf:
        raise StartError(f"a rate of {rate} is not a number of requests a second above 0")
    span = times[-1] or 1.0  # one request, or all at once
    return _microseconds(times / span * ((len(times) - 1) / rate))


def _microseconds(seconds: Seconds) -> Seconds:
    return np.round(seconds, 6)


def _checked_count(count: int) -> int:
    if count < 1:
        raise StartError(f"a workload of {count} requests is none; ask for 1 or more")
    return count


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Streams of one seed are independent, so that a long gap says nothing about a budget."""
    if seed < 0:
        raise StartError(f"the seed {seed} should be 0 or more")
    return np.random.Generator(np.random.PCG64([seed, stream]))
