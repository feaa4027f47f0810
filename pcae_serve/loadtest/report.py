"""The report of simulations and replays: DESIGN section 5's figures, in its order.

    what became of requests -> Figures of one run -> Row over seeds -> table, JSON, PNG

Everything counts over all offered requests, warm-up included: refused, expired, late and failed
ones are misses. It knows outcomes and tiers; it does not know whether a server or a simulation
made them. matplotlib, rich and scipy are imported where they are used: the server needs none.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from itertools import groupby
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.quality import wilson_interval
from pcae_serve.errors import PcaeError
from pcae_serve.loadtest.simulator import End, Outcome
from pcae_serve.scheduling.policies.registry import OURS
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.version import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

EXTRA = "simulate"
#: The end of a request that got no answer it could use: an error, or a broken connection. A
#: simulation knows none such.
FAILED = len(End)
#: Columns of a terminal, at least, where nobody looks: a table in a file should not be folded.
WIDTH = 150

FORMULAS = {
    "attainment": "answers in time / offered",
    "accuracy recovered": "(mean accuracy of the tiers used - cheapest tier's)"
    " / (best tier's - cheapest tier's), over the answers in time",
    "effective accuracy": "attainment x mean accuracy of the tiers used",
}
WITH_LABELS = {"effective accuracy": "right answers in time / offered"}


@dataclass(frozen=True)
class Figures:
    """Of one run. None: there was nothing to take it from, or a client cannot know it."""

    attainment: float
    accuracy_recovered: float | None
    effective_accuracy: float
    mean_accuracy: float | None
    goodput_per_s: float
    p50_ms: float | None  # of answers, late ones too
    p95_ms: float | None
    p99_ms: float | None
    refused: float  # share of the offered, as the next three
    expired: float
    late: float
    failed: float
    refusal_p50_ms: float | None  # until a refused one was told so
    refusal_p99_ms: float | None
    wasted_late: float | None  # share of the devices' busy time, as the next two
    wasted_cancelled: float | None
    wasted_padding: float | None
    mean_batch: float | None


#: Those that are shares: an interval goes no further than 0 and 1.
SHARES = {
    "attainment", "effective_accuracy", "mean_accuracy", "refused", "expired", "late", "failed",
    "wasted_late", "wasted_cancelled", "wasted_padding",
}  # fmt: skip


def figures(
    outcome: Outcome,
    tier_table: TierTable,
    tiers: Sequence[int],
    right: NDArray[np.bool_] | None = None,
) -> Figures:
    """What one run comes to. tiers: those allowed. right: [n], whether the answer was the label."""
    offered = len(outcome.end)
    if not offered:
        raise PcaeError("no request was offered: there is nothing to report")
    in_time = outcome.end == End.IN_TIME
    accuracy = np.array(tier_table.accuracy)
    attainment = float(in_time.mean())
    mean_accuracy = float(accuracy[outcome.tier[in_time]].mean()) if in_time.any() else None
    low, best = accuracy[tiers[0]], accuracy[list(tiers)].max()
    recovered = None
    if mean_accuracy is not None and best > low:
        recovered = float((mean_accuracy - low) / (best - low))
    waits_ms = 1e3 * (outcome.end_s - outcome.arrival_s)  # [n]
    p50, p95, p99 = _quantiles(waits_ms[in_time | (outcome.end == End.LATE)], 50, 95, 99)
    refusal_p50, refusal_p99 = _quantiles(waits_ms[outcome.end == End.REFUSED], 50, 99)

    def wasted(seconds: float) -> float | None:
        return seconds / outcome.busy_s if outcome.busy_s else None

    return Figures(
        attainment=attainment,
        accuracy_recovered=recovered,
        effective_accuracy=attainment * (mean_accuracy or 0.0)
        if right is None
        else float((in_time & right).mean()),
        mean_accuracy=mean_accuracy,
        goodput_per_s=float(in_time.sum() / outcome.span_s) if outcome.span_s else 0.0,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        refused=float((outcome.end == End.REFUSED).mean()),
        expired=float((outcome.end == End.EXPIRED).mean()),
        late=float((outcome.end == End.LATE).mean()),
        failed=float((outcome.end == FAILED).mean()),
        refusal_p50_ms=refusal_p50,
        refusal_p99_ms=refusal_p99,
        wasted_late=wasted(outcome.late_s),
        wasted_cancelled=wasted(outcome.cancelled_s),
        wasted_padding=wasted(outcome.padding_s),
        mean_batch=float(np.mean(outcome.batches)) if outcome.batches else None,
    )


@dataclass(frozen=True)
class Summary:
    """A figure over seeds. low, high: where its true mean lies, 95 times of 100."""

    mean: float
    low: float | None = None  # None: one seed tells nothing of it
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One policy under one trace and load."""

    policy: str
    trace: str
    mix: str
    load: float | None  # of capacity; None where that is not known
    rate: float | None  # requests a second; None: as recorded
    offered: int  # of one seed
    runs: tuple[Figures, ...]  # one a seed
    client: Mapping[str, float] = field(default_factory=dict)  # what only a client can tell

    def summary(self, name: str) -> Summary | None:
        """Of one figure; None where no run has it."""
        seen = [value for run in self.runs if (value := getattr(run, name)) is not None]
        if name == "attainment" and len(seen) == 1:
            return Summary(seen[0], *wilson_interval(seen[0], self.offered))
        return summarise(seen, bounded=name in SHARES) if seen else None

    @property
    def level(self) -> str:
        """How hard it was pressed, in words."""
        words = [] if self.load is None else [f"load {self.load:.3g}"]
        words += [] if self.rate is None else [f"{self.rate:.4g}/s"]
        return ", ".join(words) or "as recorded"


def summarise(values: Sequence[float], *, bounded: bool = False) -> Summary:
    """Mean of the seeds and Student's 95 % interval of it, within 0 and 1 where that is due."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Summary(mean)
    from scipy.special import stdtrit

    error = float(np.std(values, ddof=1)) / sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 0.975)) * error
    low, high = mean - half, mean + half
    return Summary(mean, max(0.0, low), min(1.0, high)) if bounded else Summary(mean, low, high)


def require(command: str) -> None:
    """Say at the start, not after minutes, what is not installed."""
    missing = [name for name in ("matplotlib", "rich", "scipy") if find_spec(name) is None]
    if missing:
        raise PcaeError(f"{command} needs {', '.join(missing)}: {install_command(EXTRA)}")


def show(rows: Sequence[Row], notes: Sequence[str], *, labels: bool = False) -> None:
    """Print a table for every trace and level, then the formulas, then the notes."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for _, group in groupby(rows, key=lambda row: (row.trace, row.mix, row.level)):
        console.print(table(list(group)))
    for name, formula in (FORMULAS | (WITH_LABELS if labels else {})).items():
        console.print(f"{name} = {formula}", markup=False)
    seeds = max(len(row.runs) for row in rows)
    over = (
        f"means of {seeds} seeds, ± or ( ): 95 % t-intervals"
        if seeds > 1
        else "one seed; ( ): 95 % Wilson interval, as if requests were independent"
    )
    console.print(f"Over all offered requests, warm-up included: {over}.", markup=False)
    for note in notes:
        console.print(note, markup=False)


def table(rows: Sequence[Row]) -> "Table":
    """The rows of one trace and level, in the order of importance of DESIGN section 5."""
    from rich import box
    from rich.table import Table

    first = rows[0]
    title = f"{first.trace}, {first.mix} budgets, {first.level}, {first.offered} requests"
    made = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    made.add_column("policy", no_wrap=True)
    for heading in (
        "attainment %", "recovered %", "effective %", "goodput/s", "p50 / p95 / p99 ms",
        "refused / expired / late %", "wasted late / left / pad %", "batch",
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    failing = any(run.failed for row in rows for run in row.runs)
    if failing:
        made.add_column("failed %", justify="right")
    for row in rows:
        cells = [
            row.policy,
            _between(row.summary("attainment")),
            _around(row.summary("accuracy_recovered")),
            _around(row.summary("effective_accuracy")),
            _plain(row, "goodput_per_s"),
            " / ".join(_plain(row, name) for name in ("p50_ms", "p95_ms", "p99_ms")),
            " / ".join(_percent(row, name) for name in ("refused", "expired", "late")),
            " / ".join(
                _percent(row, f"wasted_{name}") for name in ("late", "cancelled", "padding")
            ),
            _plain(row, "mean_batch"),
        ]
        made.add_row(*cells, *([_percent(row, "failed")] if failing else []))
    return made


def write_json(
    path: Path, rows: Sequence[Row], about: Mapping[str, Any], *, labels: bool = False
) -> None:
    """Everything, with the figures of every seed."""
    content = {
        "about": dict(about),
        "formulas": FORMULAS | (WITH_LABELS if labels else {}),
        "rows": [
            {
                "policy": row.policy,
                "trace": row.trace,
                "mix": row.mix,
                "load": row.load,
                "rate": row.rate,
                "offered": row.offered,
                "seeds": len(row.runs),
                "figures": {
                    f.name: None if (found := row.summary(f.name)) is None else asdict(found)
                    for f in fields(Figures)
                },
                "by_seed": [asdict(run) for run in row.runs],
                "client": dict(row.client),
            }
            for row in rows
        ],
    }
    _written(path, lambda: path.write_text(json.dumps(content, indent=1) + "\n"))


def write_png(path: Path, rows: Sequence[Row], caption: str) -> None:
    """The front: attainment over accuracy recovered, a panel for every trace (down) and level.

    What nobody beats in both is joined by a line; bars are the intervals over seeds.
    """
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys((row.trace, row.mix) for row in rows))
    by_trace = [
        {
            level: list(group)
            for level, group in groupby(
                (row for row in rows if (row.trace, row.mix) == trace), key=lambda row: row.level
            )
        }
        for trace in traces
    ]
    wide = max(len(levels) for levels in by_trace)
    figure = Figure(figsize=(max(6.4, 2.9 * wide + 0.6), 2.7 * len(traces) + 1.3))
    axes = figure.subplots(len(traces), wide, sharex=True, squeeze=False)
    styles = _styles(list(dict.fromkeys(row.policy for row in rows)))
    for trace, levels, line in zip(traces, by_trace, axes, strict=True):
        for axis in line[len(levels) :]:
            axis.set_visible(False)
        for axis, (level, panel) in zip(line, levels.items(), strict=False):
            axis.set_title(f"{trace[0]}, {level}" if len(traces) > 1 else level, fontsize=9)
            _front(axis, panel, styles)
        line[0].set_ylabel("attainment, %")
    for axis in axes[-1]:
        axis.set_xlabel("accuracy recovered, %")
    handles = {
        text: handle
        for axis in axes.flat
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.5)))
    below = 0.4 + 0.22 * ceil(len(handles) / columns)
    height = figure.get_figheight()
    figure.legend(
        handles.values(), handles.keys(), ncols=columns, fontsize=8, frameon=False,
        loc="lower center", bbox_to_anchor=(0.5, 0.24 / height),
    )  # fmt: skip
    figure.text(0.5, 0.08 / height, caption, ha="center", fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, below / height, 1, 1))
    _written(path, lambda: figure.savefig(path, format="png", dpi=150))


def _front(axis: "Axes", panel: Sequence[Row], styles: Mapping[str, dict[str, Any]]) -> None:
    points = []
    for row in panel:
        across, up = row.summary("accuracy_recovered"), row.summary("attainment")
        if across is None or up is None:
            continue  # not one answer in time: it has no place on the front
        points.append((100 * across.mean, 100 * up.mean))
        axis.errorbar(
            *points[-1],
            xerr=_bars(across),
            yerr=_bars(up),
            linestyle="none",
            elinewidth=0.8,
            label=row.policy,
            **styles[row.policy],
        )
    front = sorted(
        point
        for point in points
        if not any(o != point and o[0] >= point[0] and o[1] >= point[1] for o in points)
    )
    axis.plot(*zip(*front, strict=True), color="0.75", linewidth=1, zorder=0) if front else None
    axis.grid(color="0.92")
    axis.margins(0.12)
    axis.tick_params(labelsize=8)


def _styles(policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for every policy; ours are stars, and larger."""
    colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d", "#666666"]
    markers = ["o", "s", "^", "v", "D", "P", "X", "<", ">"]
    styles = {}
    others = 0
    for policy in policies:
        if policy.removesuffix("+drop") in OURS:
            style = {"color": "#d55e00", "marker": "*", "markersize": 12, "zorder": 4}
            hollow = policy.endswith("+drop")
        else:
            style = {
                "color": colours[others % len(colours)],
                "marker": markers[others % len(markers)],
                "markersize": 6,
                "zorder": 3,
            }
            others, hollow = others + 1, False
        styles[policy] = style | ({"markerfacecolor": "white"} if hollow else {})
    return styles


def _bars(found: Summary) -> list[list[float]] | None:
    if found.low is None or found.high is None:
        return None
    low, high = max(0.0, found.mean - found.low), max(0.0, found.high - found.mean)
    return [[100 * low], [100 * high]]


def _written(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise PcaeError(f"{path} cannot be written: {error.strerror}") from None


def _quantiles(values: NDArray[np.float64], *percents: float) -> list[float | None]:
    if not len(values):
        return [None] * len(percents)
    return [float(value) for value in np.percentile(values, percents)]


def _between(found: Summary | None) -> str:
    if found is None:
        return "—"
    if found.low is None or found.high is None:
        return f"{100 * found.mean:.1f}"
    return f"{100 * found.mean:.1f} ({100 * found.low:.1f}–{100 * found.high:.1f})"  # noqa: RUF001


def _around(found: Summary | None) -> str:
    if found is None:
        return "—"
    if found.high is None or found.low is None:
        return f"{_zero(100 * found.mean):.1f}"
    return f"{_zero(100 * found.mean):.1f} ±{50 * (found.high - found.low):.1f}"


def _plain(row: Row, name: str) -> str:
    found = row.summary(name)
    return "—" if found is None else f"{found.mean:.{3 if found.mean < 1000 else 4}g}"


def _percent(row: Row, name: str) -> str:
    found = row.summary(name)
    return "—" if found is None else f"{100 * found.mean:.1f}"


def _zero(value: float) -> float:
    """Without the sign that rounding leaves on nothing."""
    return round(value, 1) + 0.0
