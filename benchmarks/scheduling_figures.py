"""Draw the figures of docs/scheduling.md from the simulator, the same on every run.

    python benchmarks/scheduling_figures.py [FOLDER]     default: docs/

    scheduling-load.svg      a sudden crowd: tiers and rejections over time
    scheduling-batches.svg   some requests of a burst: wait, batch, tier, deadline

Both run policy `pace` with the built-in profile `gpu` and `mixed` budgets. Colours differ in
lightness, so that they differ without hue, and every one is named in the figure.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pcae_serve.loadtest import platforms, workload
from pcae_serve.loadtest.simulation import SERVICE_SEED
from pcae_serve.loadtest.simulator import End, Outcome, draw, simulate
from pcae_serve.scheduling.events import Action, Dispatch, Event
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.settings import MAX_BATCH

#: When the figures were last changed; drawn into them.
DATE = "2026-11-27"
POLICY, PROFILE, MIX, SEED = "pace", "gpu", "mixed", 0
#: Light to dark from the cheapest tier to the most accurate one; and what got no answer.
TIERS = ("#deebf7", "#b3d2ea", "#85b8dd", "#4e97c9", "#2171b5", "#08306b")
REFUSED = "#d55e00"
STYLE = """text{font:13px system-ui,sans-serif;fill:#222}.s{font-size:12px;fill:#555}
.g{stroke:#ccc}.a{stroke:#5b6b8c;fill:none}.m{stroke:#d55e00;fill:none;stroke-dasharray:5 4}
.d{stroke:#222;stroke-width:2}.w{stroke:#999;stroke-width:2}
.k{stroke:#5b6b8c;stroke-width:.5}.b{font-size:11px;fill:#222}.l{font-size:11px;fill:#fff}
@media (prefers-color-scheme:dark){text{fill:#e6e6e6}.s{fill:#b0b0b0}.g{stroke:#444}
.a{stroke:#8fa3c8}.d{stroke:#e6e6e6}}"""

Sent = list[tuple[float, Dispatch]]


def main(arguments: list[str]) -> None:
    """Write both figures."""
    folder = Path(arguments[0] if arguments else "docs")
    for name, figure in (("load", load_figure()), ("batches", batches_figure())):
        (folder / f"scheduling-{name}.svg").write_text(figure, encoding="utf-8")


def run(trace: str, load: float, requests: int) -> tuple[Outcome, Sent, float]:
    """Simulate a trace; return the outcome, the batches with their starts, and the capacity."""
    platform = platforms.read(PROFILE)
    capacity_per_s = platform.capacity_per_s[MIX]
    made = workload.make(trace, MIX, load * capacity_per_s, requests, platform.full_s, SEED)
    scheduler = Scheduler(
        registry.create(POLICY, platform.tier_table, DEFAULT_PRICE),
        platform.latency(MAX_BATCH),
        max_batch=MAX_BATCH,
    )
    seconds = draw(platform.seconds(MAX_BATCH), MAX_BATCH, SEED + SERVICE_SEED)
    sent: Sent = []

    def note(event: Event, actions: list[Action]) -> None:
        sent.extend((event.now_s, each) for each in actions if isinstance(each, Dispatch))

    tiers = tuple(range(len(platform.tiers)))
    outcome = simulate(made.times_s, made.budgets_s, scheduler, seconds, tiers, observer=note)
    return outcome, sent, capacity_per_s


def load_figure(requests: int = 20_000, bins: int = 60) -> str:
    """Return a figure of a flash: requests per second, and how they ended."""
    outcome, _, capacity_per_s = run("flash", 0.6, requests)
    span_s = float(outcome.arrival_s[-1])
    bin_s = span_s / bins
    bin_of = np.minimum((outcome.arrival_s / bin_s).astype(int), bins - 1)
    rate = np.bincount(bin_of, minlength=bins) / bin_s
    names = [tier.name for tier in platforms.read(PROFILE).tiers]
    in_time = outcome.end == End.IN_TIME
    parts = [
        np.bincount(bin_of[in_time & (outcome.tier == i)], minlength=bins)
        for i in range(len(names))
    ]
    parts.append(np.bincount(bin_of[~in_time], minlength=bins))
    shares = np.array(parts) / (rate * bin_s)
    left, wide, top, low = 70.0, 620.0, 28.0, 110.0
    step, peak = wide / bins, 1.08 * float(rate.max())
    lines = [text(left, 16, "requests per second"), *axis(left, top, wide, low, 0, peak, "{:,.0f}")]
    points = "".join(
        f"{'L' if i else 'M'}{left + i * step:.1f} {top + low * (1 - each / peak):.1f}h{step:.1f}"
        for i, each in enumerate(rate)
    )
    lines += [f'<path class="a" stroke-width="2" d="{points}"/>']
    level = top + low * (1 - capacity_per_s / peak)
    lines += [line("m", left, level, f"h{wide:.1f}")]
    lines += [text(left + 6, level - 6, f"load 1: {capacity_per_s:,.0f} requests/s", "s")]
    top, high = 184.0, 190.0
    lines += [text(left, 172, "share of the requests that arrive then, by the tier that answers")]
    for i in range(bins):
        base = top + high
        for share, colour in zip(shares[:, i], (*TIERS, REFUSED), strict=True):
            height = high * float(share)
            base -= height
            if share > 0:
                lines.append(rect(left + i * step, base, step + 0.2, height, colour))
    lines += axis(left, top, wide, high, 0, 100, "{:.0f} %")
    lines += time_axis(left, top + high, wide, 0, 1e3 * span_s)
    lines += key(left + wide + 24, top + 4, [*names[::-1], "not in time"], (*TIERS[::-1], REFUSED))
    refused = float((~in_time).mean())
    title = (
        "A sudden crowd: for a tenth of the time four times as many requests arrive. The server"
        " answers on cheaper tiers, refuses what no tier can serve, and recovers"
    )
    about = f"trace flash, {len(in_time):,} requests, {refused:.1%} not in time"
    return document(820, 448, title, about, lines)


def batches_figure(first: int = 222, count: int = 24) -> str:
    """Return a figure of requests in their order of arrival: wait, batch, deadline."""
    outcome, sent, _ = run("azure-code", 0.6, 1_000)
    begun = {id_: (at_s, batch) for at_s, batch in sent for id_ in batch.ids}
    names = [tier.name for tier in platforms.read(PROFILE).tiers]
    ids = range(first, first + count)
    begin_s = float(outcome.arrival_s[first])
    end_s = float(outcome.end_s[ids].max())
    left, wide, top, high = 110.0, 580.0, 12.0, 15.0
    scale = wide / (1.05 * (end_s - begin_s))

    def x(seconds: float) -> float:
        return left + (seconds - begin_s) * scale

    lines: list[str] = []
    named: set[tuple[int, ...]] = set()
    for row, id_ in enumerate(ids):
        y = top + row * high
        arrival_s, budget_s = float(outcome.arrival_s[id_]), float(outcome.budget_s[id_])
        lines.append(text(left - 8, y + 10, f"budget {1e3 * budget_s:.0f} ms", "s", "end"))
        at_s, batch = begun[id_]
        colour, over = TIERS[batch.tier], x(float(outcome.end_s[id_])) - x(at_s)
        lines += [line("w", x(arrival_s), y + 6, f"H{x(at_s):.1f}")]
        lines += [rect(x(at_s), y, over, 12, colour, "k")]
        if batch.ids not in named:
            named.add(batch.ids)
            kind = "b" if batch.tier < 3 else "l"
            lines.append(text(x(at_s) + 4, y + 10, names[batch.tier], kind))
        if x(arrival_s + budget_s) <= left + wide:
            lines.append(line("d", x(arrival_s + budget_s), y, "v12"))
    bottom = top + count * high
    lines += time_axis(left, bottom + 4, wide, 0, 1e3 * wide / scale)
    right = left + wide + 24
    lines += key(right, top + 4, names[::-1], TIERS[::-1])
    lines += [line("w", right, top + 138, "h14"), text(right + 20, top + 142, "waits", "s")]
    lines += [line("d", right + 7, top + 150, "v12"), text(right + 20, top + 160, "deadline", "s")]
    title = (
        "Requests of a burst, one a line: each waits until the device is free, then runs in a batch"
        " whose tier is chosen at that moment; bars that begin together are one batch"
    )
    about = f"trace azure-code, {count} of 1,000 requests"
    return document(820, bottom + 70, title, about, lines)


def document(width: float, height: float, title: str, about: str, lines: list[str]) -> str:
    """Return an SVG document with a caption that states what was simulated."""
    source = f"simulated: policy {POLICY}, profile {PROFILE}, {MIX} budgets, {about};"
    caption = [text(10, height - 8, f"{source} {DATE}", "s")]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
        f' aria-label="{title}">'
    )
    about_it = [f"<title>{title}</title>", f"<style>{STYLE}</style>"]
    return "\n".join([head, *about_it, *lines, *caption, "</svg>\n"])


def line(kind: str, x: float, y: float, to: str) -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}{to}"/>'


def rect(x: float, y: float, wide: float, high: float, colour: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    size = f'width="{wide:.1f}" height="{high:.1f}"'
    return f'<rect{mark} x="{x:.1f}" y="{y:.1f}" {size} fill="{colour}"/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    mark = f' class="{kind}"' if kind else ""
    end = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}"{end}>{words}</text>'


def axis(
    left: float, top: float, wide: float, high: float, low: float, peak: float, shown: str
) -> Iterator[str]:
    """Yield a vertical axis with round values."""
    for value in ticks(low, peak):
        y = top + high * (1 - (value - low) / (peak - low))
        yield line("g", left, y, f"h{wide:.1f}")
        yield text(left - 6, y + 4, shown.format(value), "s", "end")


def time_axis(left: float, y: float, wide: float, low: float, high: float) -> Iterator[str]:
    """Yield a horizontal axis in ms, or in s if it is long."""
    unit, factor = ("s", 1e-3) if high > 2000 else ("ms", 1.0)
    yield line("a", left, y, f"h{wide:.1f}")
    for value in ticks(low * factor, high * factor):
        x = left + wide * (value / factor - low) / (high - low)
        yield line("a", x, y, "v5")
        yield text(x, y + 18, f"{value:g}", "s", "middle")
    yield text(left + wide / 2, y + 36, f"time, {unit}", "s", "middle")


def key(x: float, y: float, names: list[str], colours: tuple[str, ...]) -> Iterator[str]:
    """Yield a square and a name for each colour."""
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        yield rect(x, y + 20 * i, 14, 14, colour, "k")
        yield text(x + 20, y + 20 * i + 12, name, "s")


def ticks(low: float, high: float) -> list[float]:
    """Return about five round values between two numbers."""
    step = 10.0 ** np.floor(np.log10((high - low) / 2))
    step *= next(each for each in (0.5, 1.0, 2.0, 5.0) if (high - low) / (step * each) <= 6)
    return [float(each) for each in np.arange(np.ceil(low / step), high / step + 1e-9) * step]


if __name__ == "__main__":
    main(sys.argv[1:])
