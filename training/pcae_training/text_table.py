"""Tables as plain text."""

from collections.abc import Iterable, Sequence


def align_columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a line per row, with the columns aligned at their left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
