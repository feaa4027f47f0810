"""Show what second looks reach: a table for the card, and a drawing as SVG."""

import io
from collections.abc import Iterator, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from pcae_export.calibrate import Cascade, best_cascades
from pcae_export.plot_style import CHOSEN, OTHER, REPEATABLE
from pcae_serve.bundle.calibration import Calibration
from pcae_serve.bundle.manifest import Tier
from pcae_serve.loadtest import plot_style

#: File of the drawing in a bundle.
LOOKS_IMAGE = "second-looks.svg"
#: Rows of the table, at most.
ROWS = 8


def format_looks(
    cascades: Sequence[Cascade], tiers: Sequence[Tier], calibration: Calibration, n: int
) -> Iterator[str]:
    """Yield the table in Markdown, then what it says. n: images that it was measured on."""
    front = best_cascades(cascades)
    step = max(1, -(-len(front) // ROWS))
    measure = _measure(tiers)
    yield f"| first | second | images that run again | GMACs | {measure} | over the best tier |"
    yield "|" + " --- |" * 6
    for each in front[::-1][::step][::-1]:
        yield (
            f"| {each.first} | {each.second} | {100 * each.share:.0f} % | {each.macs / 1e9:.3f} |"
            f" {100 * each.quality:.2f} % | {100 * each.over:+.2f} ± {100 * each.half_width:.2f} |"
        )
    yield ""
    yield f"![Second looks and plain tiers]({LOOKS_IMAGE})"
    yield ""
    right = "the label" if calibration.right == "label" else "the class at keep ratio 1"
    yield (
        f"Every image runs on the first tier, those with the least sure answers again on the second"
        f" one; measured on {n:,} images. Over the best tier: points above the best single tier of"
        " at most as many multiply-adds per image, with the paired 95 % interval. Which answers are"
        f" sure was fitted on {calibration.n:,} other images of {calibration.data_set}, with"
        f" {right} as the right answer. A server with time left does the same per request."
    )


def draw_looks(cascades: Sequence[Cascade], tiers: Sequence[Tier], title: str, n: int) -> bytes:
    """Return an SVG of quality against mean multiply-adds: plain tiers, and second looks."""
    with mpl.rc_context(REPEATABLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(
            [each.macs / 1e9 for each in cascades],
            [100 * each.quality for each in cascades],
            linestyle="none", marker=".", markersize=4, color="0.7",
        )  # fmt: skip
        front = best_cascades(cascades)
        axes.plot(
            [each.macs / 1e9 for each in front],
            [100 * each.quality for each in front],
            color=CHOSEN, linewidth=1.5, label="with second looks",
        )  # fmt: skip
        known = [
            (tier.macs / 1e9, 100 * tier.quality) for tier in tiers if tier.quality is not None
        ]
        axes.plot(*zip(*known, strict=True), color=OTHER, marker="o", label="one tier for all")
        for tier in tiers:
            if tier.quality is not None:
                axes.annotate(
                    tier.name, (tier.macs / 1e9, 100 * tier.quality),
                    xytext=(8, -12), textcoords="offset points", fontsize=9,
                )  # fmt: skip
        axes.set_xlabel("multiply-adds per image, 10⁹ (mean)")
        axes.set_ylabel(f"{_measure(tiers)}, %")
        heading = plot_style.dated(f"{title}; n = {n:,} images")
        axes.set_title(heading, fontsize=plot_style.TITLE)
        plot_style.style(axes)
        axes.legend(fontsize=plot_style.LABEL, frameon=False, loc="lower right")
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _measure(tiers: Sequence[Tier]) -> str:
    return "top-1" if tiers[0].accuracy is not None else "same class as at keep ratio 1"
