"""Show the candidates for tiers and the choice: a table for terminal and card, a drawing as SVG."""

import io
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pcae_export.plot_style import CHOSEN, OTHER, REPEATABLE
from pcae_export.tier_front import MIN_STEP, Candidate, Front
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_serve.loadtest import plot_style

#: File of the drawing in a bundle.
FRONT_IMAGE = "front.svg"
#: What a candidate's score is, for headings.
MEASURES = {
    Accuracy: "top-1, %",
    Agreement: "same class as at keep ratio 1, %",
    Fidelity: "cosine of the features to those at keep ratio 1",
}


def format_front(front: Front) -> Iterator[str]:
    """Yield the table in Markdown, then a paragraph on the choice."""
    several = len({candidate.tier.model for candidate in front.candidates}) > 1
    names = {id(candidate): name for name, candidate in front.named()}
    header = ["model"] * several + ["keep ratio", "precision", "ms", _measure(front), "tier"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for candidate in front.candidates:
        tier = candidate.tier
        low, high = candidate.measured.interval
        cells = [tier.model] * several + [f"{tier.keep_ratio:g}", tier.precision]
        cells += [f"{1e3 * candidate.seconds:.2f}"]
        cells += [f"{_shown(front, candidate.score)} [{_shown(front, low)}, {_shown(front, high)}]"]
        cells += [names.get(id(candidate), "" if candidate in front.optimal else "not optimal")]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield f"![The candidates, the front and the chosen tiers]({FRONT_IMAGE})"
    yield ""
    n = len(front.candidates[0].measured.scores)
    yield (
        f"Tiers chosen by `--tiers auto` on {n:,} images, with 95 % intervals; the qualities of the"
        " tiers in this card are measured on other images. ms: median time of one image on this"
        f" machine ({front.machine}); its relative standard error is {_noise(front)}. Not optimal:"
        " another candidate is faster and at least as good. A chosen tier is the fastest of those"
        " that are not measurably worse than the best of its level, and at least"
        f" {MIN_STEP:g} times as fast as the next one; the model at keep ratio 1 in float32 is"
        " always among them."
    )


def draw_front(front: Front, title: str) -> bytes:
    """Return an SVG of quality against time: all candidates, the front, and the chosen tiers."""
    factor = 1 if _is_cosine(front) else 100
    with mpl.rc_context(REPEATABLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        optimal = [(1e3 * c.seconds, factor * c.score) for c in front.optimal]
        axes.plot(*zip(*optimal, strict=True), color=plot_style.LINE, linewidth=1, zorder=0)
        for precision, marker in (("float32", "o"), ("int8", "s")):
            some = [c for c in front.candidates if c.tier.precision == precision]
            if some:
                _errorbars(axes, some, factor, color=OTHER, marker=marker, label=precision)
        chosen = list(front.chosen)
        _errorbars(axes, chosen, factor, color=CHOSEN, marker="*", markersize=12, label="chosen")
        for name, candidate in front.named():
            axes.annotate(
                f"{name} ({candidate.tier.keep_ratio:g})",
                (1e3 * candidate.seconds, factor * candidate.score),
                xytext=(8, -12), textcoords="offset points", fontsize=9,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("time of one image, ms (logarithmic)")
        axes.set_ylabel(_measure(front))
        axes.set_title(title, fontsize=plot_style.TITLE)
        plot_style.style(axes)
        axes.legend(fontsize=plot_style.LABEL, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _errorbars(axes: Axes, some: Sequence[Candidate], factor: int, **style: Any) -> None:
    """Draw candidates with the intervals of their quality."""
    scores = np.array([candidate.score for candidate in some])
    bounds = np.array([candidate.measured.interval for candidate in some]).T  # [2, N]
    axes.errorbar(
        [1e3 * candidate.seconds for candidate in some],
        factor * scores,
        yerr=factor * np.abs(bounds - scores),
        linestyle="none",
        elinewidth=0.8,
        **style,
    )


def _noise(front: Front) -> str:
    return f"{front.noise:.1%}" if isfinite(front.noise) else "unknown (too few rounds)"


def _measure(front: Front) -> str:
    return MEASURES[type(front.candidates[0].measured.quality)]


def _is_cosine(front: Front) -> bool:
    return isinstance(front.candidates[0].measured.quality, Fidelity)


def _shown(front: Front, score: float) -> str:
    return f"{score:.4f}" if _is_cosine(front) else f"{100 * score:.1f}"
