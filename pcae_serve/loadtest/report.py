"""Reports of simulations and replays: attainment, accuracy, response times, wasted compute.

    Outcome -> Figures of one run -> Row over seeds -> table, JSON, plot

All shares are of all offered requests, warm-up included: rejected, dropped, expired, late and
failed requests are misses. matplotlib, rich and scipy are imported inside functions, because the
server does without them.
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
from pcae_serve.loadtest import plot_style
from pcae_serve.loadtest.simulator import End, Outcome
from pcae_serve.scheduling.policies.registry import OURS
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.version import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

EXTRA = "simulate"
#: Least table width without a terminal, so that a table in a file is not wrapped.
WIDTH = 160

FORMULAS = {
    "attainment": "answers in time / offered",
    "accuracy recovered": "(mean accuracy of the tiers used - cheapest tier's)"
    " / (best tier's - cheapest tier's), over the answers in time",
    "effective accuracy": "attainment x mean accuracy of the tiers used",
}
WITH_LABELS = {
    "accuracy recovered": "(share of correct answers - cheapest tier's accuracy)"
    " / (best tier's - cheapest tier's), over the answers in time",
    "effective accuracy": "correct answers in time / offered",
}
LEGEND = (
    "goodput: answers in time per second; response: time from arrival to answer, over the answers"
    " in time; wasted: share of the devices' busy time.",
    "rejected: refused at admission; dropped: removed from the queue by the policy; expired:"
    " deadline passed in the queue; late: answered after the deadline.",
)


@dataclass(frozen=True)
class Figures:
    """Figures of one run. None: no data, or not visible to a client."""

    attainment: float
    accuracy_recovered: float | None
    effective_accuracy: float
    mean_accuracy: float | None  # over the answers in time: expected, or with labels measured
    goodput_per_s: float  # answers in time per second
    response_mean_ms: float | None  # from arrival to answer, over the answers in time
    response_p50_ms: float | None
    response_p99_ms: float | None
    rejected: float  # share of the offered requests, as the next four
    dropped: float
    expired: float
    late: float
    failed: float
    rejection_p50_ms: float | None  # time until a rejection
    rejection_p99_ms: float | None
    wasted_late: float | None  # share of the devices' busy time, as the next two
    wasted_cancelled: float | None
    wasted_padding: float | None
    mean_batch: float | None


#: Figures between 0 and 1; their intervals are cut off there.
SHARES = {
    "attainment", "effective_accuracy", "mean_accuracy", "rejected", "dropped", "expired", "late",
    "failed", "wasted_late", "wasted_cancelled", "wasted_padding",
}  # fmt: skip


def figures(
    outcome: Outcome,
    tier_table: TierTable,
    tiers: Sequence[int],
    right: NDArray[np.bool_] | None = None,
    accuracy: NDArray[np.float64] | None = None,
) -> Figures:
    """Return the figures of one run.

    tiers: the allowed ones, cheapest first. right: [n], whether the answer equals the label; with
    it, accuracy is the share of correct answers. accuracy: [n], expected of each answer, if there
    are no labels (default: its tier's).
    """
    offered = len(outcome.end)
    if not offered:
        raise PcaeError("no request was offered")
    in_time = outcome.end == End.IN_TIME
    of_tier = np.array(tier_table.accuracy)
    if right is not None:
        accuracy = right.astype(float)
    of_answer = of_tier[outcome.tier] if accuracy is None else accuracy
    attainment = float(in_time.mean())
    mean_accuracy = float(of_answer[in_time].mean()) if in_time.any() else None
    low, best = of_tier[tiers[0]], of_tier[list(tiers)].max()
    recovered = None
    if mean_accuracy is not None and best > low:
        recovered = float((mean_accuracy - low) / (best - low))
    took_ms = 1e3 * (outcome.end_s - outcome.arrival_s)  # [n]
    p50, p99 = _percentiles(took_ms[in_time], 50, 99)
    rejection_p50, rejection_p99 = _percentiles(took_ms[outcome.end == End.REJECTED], 50, 99)

    def share(end: End) -> float:
        return float((outcome.end == end).mean())

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
        response_mean_ms=float(took_ms[in_time].mean()) if in_time.any() else None,
        response_p50_ms=p50,
        response_p99_ms=p99,
        rejected=share(End.REJECTED),
        dropped=share(End.DROPPED),
        expired=share(End.EXPIRED),
        late=share(End.LATE),
        failed=share(End.FAILED),
        rejection_p50_ms=rejection_p50,
        rejection_p99_ms=rejection_p99,
        wasted_late=wasted(outcome.late_s),
        wasted_cancelled=wasted(outcome.cancelled_s),
        wasted_padding=wasted(outcome.padding_s),
        mean_batch=float(np.mean(outcome.batches)) if outcome.batches else None,
    )


@dataclass(frozen=True)
class Summary:
    """A figure over seeds with its 95 % confidence interval."""

    mean: float
    low: float | None = None  # None: not estimated from one seed
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """The runs of one policy on one trace at one rate."""

    policy: str
    trace: str
    mix: str
    load: float | None  # in multiples of the capacity; None: capacity unknown
    rate: float | None  # requests per second; None: as recorded
    offered: int  # requests per seed
    runs: tuple[Figures, ...]  # one per seed
    client: Mapping[str, float] = field(default_factory=dict)  # figures of the load generator

    def summary(self, name: str) -> Summary | None:
        """Summarise one figure over the seeds; None if no run has it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        if name == "attainment" and len(values) == 1:
            return Summary(values[0], *wilson_interval(values[0], self.offered))
        return summarise(values, bounded=name in SHARES) if values else None

    @property
    def level(self) -> str:
        """The load and rate as text."""
        words = [] if self.load is None else [f"load {self.load:.3g}"]
        words += [] if self.rate is None else [f"{self.rate:.4g}/s"]
        return ", ".join(words) or "as recorded"


def summarise(values: Sequence[float], *, bounded: bool = False) -> Summary:
    """Return the mean over seeds and its 95 % t-interval, cut off at 0 and 1 if bounded."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Summary(mean)
    from scipy.special import stdtrit

    error = float(np.std(values, ddof=1)) / sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 0.975)) * error
    low, high = mean - half, mean + half
    return Summary(mean, max(0.0, low), min(1.0, high)) if bounded else Summary(mean, low, high)


def require(command: str) -> None:
    """Raise PcaeError if a package that the command needs is not installed."""
    missing = [name for name in ("matplotlib", "rich", "scipy") if find_spec(name) is None]
    if missing:
        raise PcaeError(f"{command} needs {', '.join(missing)}: {install_command(EXTRA)}")


def show(rows: Sequence[Row], notes: Sequence[str], *, labels: bool = False) -> None:
    """Print a table per trace and level, then the definitions, then the notes."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for _, group in groupby(rows, key=lambda row: (row.trace, row.mix, row.level)):
        console.print(table(list(group)))
    for name, formula in (FORMULAS | (WITH_LABELS if labels else {})).items():
        console.print(f"{name} = {formula}", markup=False)
    seeds = max(len(row.runs) for row in rows)
    interval = (
        f"mean of {seeds} seeds; ± or ( ): 95 % t-interval"
        if seeds > 1
        else "one seed; ( ): 95 % Wilson interval, which assumes independent requests"
    )
    console.print(f"All offered requests count, warm-up included; {interval}.", markup=False)
    for line in LEGEND:
        console.print(line, markup=False)
    for note in notes:
        console.print(note, markup=False)


def table(rows: Sequence[Row]) -> "Table":
    """Return the table of one trace and level, the most important figures first."""
    from rich import box
    from rich.table import Table

    first = rows[0]
    title = f"{first.trace}, {first.mix} budgets, {first.level}, {first.offered} requests"
    made = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    made.add_column("policy", no_wrap=True)
    for heading in (
        "attainment %", "accuracy\nrecovered %", "effective\naccuracy %", "goodput/s",
        "response ms\nmean / p50 / p99", "rejected / dropped /\nexpired / late %",
        "wasted: late /\ncancelled / padding %", "mean\nbatch",
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    failing = any(run.failed for row in rows for run in row.runs)
    if failing:
        made.add_column("failed %", justify="right")
    for row in rows:
        cells = [
            row.policy,
            _with_interval(row.summary("attainment")),
            _with_half_width(row.summary("accuracy_recovered")),
            _with_half_width(row.summary("effective_accuracy")),
            _number(row, "goodput_per_s"),
            " / ".join(_number(row, f"response_{name}_ms") for name in ("mean", "p50", "p99")),
            " / ".join(_percent(row, name) for name in ("rejected", "dropped", "expired", "late")),
            " / ".join(
                _percent(row, f"wasted_{name}") for name in ("late", "cancelled", "padding")
            ),
            _number(row, "mean_batch"),
        ]
        made.add_row(*cells, *([_percent(row, "failed")] if failing else []))
    return made


def write_json(
    path: Path, rows: Sequence[Row], about: Mapping[str, Any], *, labels: bool = False
) -> None:
    """Write all figures, summarised and by seed."""
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
                    f.name: None if (summary := row.summary(f.name)) is None else asdict(summary)
                    for f in fields(Figures)
                },
                "by_seed": [asdict(run) for run in row.runs],
                "client": dict(row.client),
            }
            for row in rows
        ],
    }
    _write(path, lambda: path.write_text(json.dumps(content, indent=1) + "\n"))


def write_png(path: Path, rows: Sequence[Row], caption: str) -> None:
    """Plot attainment against accuracy recovered, a panel per trace (down) and level (across).

    A line joins the Pareto-optimal policies; bars are the intervals over seeds. caption: what was
    measured; the number of requests and the date are added.
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
            title = f"{trace[0]}, {level}" if len(traces) > 1 else level
            axis.set_title(title, fontsize=plot_style.TITLE)
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
        handles.values(), handles.keys(), ncols=columns, fontsize=plot_style.LABEL, frameon=False,
        loc="lower center", bbox_to_anchor=(0.5, 0.24 / height),
    )  # fmt: skip
    seeds, offered = max(len(row.runs) for row in rows), max(row.offered for row in rows)
    n = f"n = {offered:,} requests" + (f" × {seeds} seeds" if seeds > 1 else "")  # noqa: RUF001
    plot_style.write_caption(figure, plot_style.dated(f"{caption}; {n}"))
    figure.tight_layout(rect=(0, below / height, 1, 1))
    _write(path, lambda: figure.savefig(path, format="png", dpi=150))


def _front(axis: "Axes", panel: Sequence[Row], styles: Mapping[str, dict[str, Any]]) -> None:
    points = []
    for row in panel:
        across, up = row.summary("accuracy_recovered"), row.summary("attainment")
        if across is None or up is None:
            continue  # no answer in time
        points.append((100 * across.mean, 100 * up.mean))
        axis.errorbar(
            *points[-1],
            xerr=_error_bars(across),
            yerr=_error_bars(up),
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
    axis.plot(
        *zip(*front, strict=True), color=plot_style.LINE, linewidth=1, zorder=0
    ) if front else None
    plot_style.style(axis)
    axis.margins(0.12)


def _styles(policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for every policy; ours is a larger star."""
    colours, markers = plot_style.COLOURS, plot_style.MARKERS
    styles = {}
    others = 0
    for policy in policies:
        if policy.removesuffix("+drop") in OURS:
            style = {"color": plot_style.EMPHASIS, "marker": "*", "markersize": 12, "zorder": 4}
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


def _error_bars(summary: Summary) -> list[list[float]] | None:
    if summary.low is None or summary.high is None:
        return None
    low, high = max(0.0, summary.mean - summary.low), max(0.0, summary.high - summary.mean)
    return [[100 * low], [100 * high]]


def _write(path: Path, write: Callable[[], object]) -> None:
    """Call `write`; raise PcaeError if the file cannot be written."""
    try:
        write()
    except OSError as error:
        raise PcaeError(f"cannot write {path}: {error.strerror}") from None


def _percentiles(values: NDArray[np.float64], *percents: float) -> list[float | None]:
    if not len(values):
        return [None] * len(percents)
    return [float(value) for value in np.percentile(values, percents)]


def _with_interval(summary: Summary | None) -> str:
    if summary is None:
        return "—"
    mean, low, high = summary.mean, summary.low, summary.high
    if low is None or high is None:
        return f"{100 * mean:.1f}"
    return f"{100 * mean:.1f} ({100 * low:.1f}–{100 * high:.1f})"  # noqa: RUF001


def _with_half_width(summary: Summary | None) -> str:
    if summary is None:
        return "—"
    mean, low, high = summary.mean, summary.low, summary.high
    rounded = round(100 * mean, 1) + 0.0  # without the sign of a rounded -0.0
    return (
        f"{rounded:.1f}"
        if low is None or high is None
        else f"{rounded:.1f} ±{50 * (high - low):.1f}"
    )


def _number(row: Row, name: str) -> str:
    summary = row.summary(name)
    return "—" if summary is None else f"{summary.mean:.{3 if summary.mean < 1000 else 4}g}"


def _percent(row: Row, name: str) -> str:
    summary = row.summary(name)
    return "—" if summary is None else f"{100 * summary.mean:.1f}"
