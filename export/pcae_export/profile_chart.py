"""Draw a profile: the quality of each tier against the time of an image."""

import io
from collections.abc import Mapping, Sequence
from textwrap import fill

from matplotlib.figure import Figure

from pcae_export.front_report import MEASURES
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Fidelity
from pcae_serve.loadtest import plot_style


def draw_profile(
    tiers: Sequence[Tier], image_ms: Mapping[int, Sequence[float]], title: str, caption: str
) -> bytes:
    """Return a PNG with a line through the tiers for each batch size.

    image_ms: by batch size, the median time of an image on each tier. If a tier has no measured
    quality, keep ratios are drawn instead.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    heading, worth, bars = _quality(tiers)
    looks = zip(plot_style.COLOURS, plot_style.MARKERS, strict=False)
    for (batch, times), (colour, marker) in zip(image_ms.items(), looks, strict=False):
        label = "one image" if batch == 1 else f"batch of {batch}"
        look = {"color": colour, "marker": marker, "linewidth": 1, "elinewidth": 0.8}
        axes.errorbar(times, worth, yerr=bars, label=label, **look)  # type: ignore[arg-type]
    for tier, x, y in zip(tiers, image_ms[min(image_ms)], worth, strict=True):
        axes.annotate(
            f"{tier.name} ({tier.keep_ratio:g})", (x, y), xytext=(6, -11),
            textcoords="offset points", fontsize=plot_style.LABEL,
        )  # fmt: skip
    plot_style.style(axes)
    axes.set_xlabel("median time of an image, ms")
    axes.set_ylabel(heading)
    axes.set_title(title, fontsize=plot_style.TITLE)
    axes.margins(x=0.12)
    axes.legend(fontsize=plot_style.LABEL, frameon=False, loc="lower right")
    figure.supxlabel(fill(caption, 110), fontsize=plot_style.SMALL, color=plot_style.CAPTION)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _quality(tiers: Sequence[Tier]) -> tuple[str, list[float], list[list[float]] | None]:
    """Return the name of the measure, its values, and lengths of their intervals down and up."""
    found = [tier.accuracy or tier.agreement or tier.fidelity for tier in tiers]
    measured = [each for each in found if each is not None]
    if len(measured) < len(tiers):
        return "keep ratio", [tier.keep_ratio for tier in tiers], None
    heading = f"{MEASURES[type(measured[0])]} (n = {measured[0].n:,})"
    factor = 1 if isinstance(measured[0], Fidelity) else 100
    values = [factor * (tier.quality or 0.0) for tier in tiers]
    bounds = [
        tier.quality_interval or (value / factor,) * 2
        for tier, value in zip(tiers, values, strict=True)
    ]
    down = [value - factor * low for value, (low, _) in zip(values, bounds, strict=True)]
    up = [factor * high - value for value, (_, high) in zip(values, bounds, strict=True)]
    return heading, values, [[max(0.0, each) for each in ends] for ends in (down, up)]
