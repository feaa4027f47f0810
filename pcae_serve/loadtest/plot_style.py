"""The look that all plots share: colours for everyone, a light grid, n and date below."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, for people who see red and green alike.
EMPHASIS = "#d55e00"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d", "#666666")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">")
LINE = "0.75"  # of a front
SMALL, LABEL, TITLE = 7, 8, 9  # points
CAPTION = "0.4"


def style(axes: "Axes") -> None:
    """Give the axes a light grid and small numbers."""
    axes.grid(color="0.92", which="both")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=LABEL)


def dated(text: str) -> str:
    """Return a caption with today's date."""
    return f"{text}; {datetime.now(UTC):%Y-%m-%d}"


def write_caption(figure: "Figure", text: str) -> None:
    """Write small text below the axes, in the middle."""
    height = figure.get_figheight()
    figure.text(0.5, 0.08 / height, text, ha="center", fontsize=SMALL, color=CAPTION)
