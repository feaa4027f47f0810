"""Draw a confusion matrix as PNG."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pcae_training.class_report import ClassReport

#: Classes that are readable in one image; of more, those with the most errors are drawn.
MAX_CLASSES = 30
#: Characters of a class's name.
MAX_NAME = 24


def draw_confusion(report: ClassReport, title: str) -> bytes:
    """Return a PNG: true classes as rows, each coloured by its share of the row's images."""
    errors = report.confusion.sum(dim=0) + report.confusion.sum(dim=1)
    errors -= 2 * report.confusion.diagonal()
    count = min(MAX_CLASSES, len(report.names))
    drawn = errors.topk(count).indices.sort().values if len(report.names) > count else None
    matrix = report.confusion if drawn is None else report.confusion[drawn][:, drawn]
    places = range(len(report.names)) if drawn is None else drawn.tolist()
    names = [_short(report.names[place]) for place in places]
    shares = matrix / report.confusion.sum(dim=1)[list(places)].clamp(min=1)[:, None]
    side = 2.5 + 0.45 * count
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    for row, column in matrix.nonzero().tolist():
        dark = shares[row, column] > 0.5
        axes.text(
            column, row, f"{int(matrix[row, column])}", ha="center", va="center",
            fontsize=7, color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(count), names, rotation=90)
    axes.set_yticks(range(count), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    more = "" if drawn is None else f" ({count} of {len(report.names)} classes, most errors)"
    axes.set_title(title + more)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
