"""Write the answer to each image as a table, Parquet or CSV."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from pcae_serve.errors import PcaeError
from pcae_training.output import check_writable, write_whole
from pcae_training.score import Score

SUFFIXES = (".parquet", ".csv")


def check_predictions(file: Path) -> None:
    """Raise PcaeError if `write_predictions` cannot write `file`."""
    if file.suffix.lower() not in SUFFIXES:
        raise PcaeError(f"--predictions {file} must end with {' or '.join(SUFFIXES)}")
    check_writable(file)


def write_predictions(
    file: Path,
    scores: Mapping[float, Score],
    names: Sequence[str],
    rows: Sequence[int],
    places: Sequence[str],
) -> None:
    """Write a line per image and keep ratio, atomically.

    rows, places: each image's row in the data, and its file. Raise PcaeError if it cannot be
    written.
    """
    tables = [
        pa.table(
            {
                "row": pa.array(rows, pa.int64()),
                "image": list(places),
                "keep_ratio": pa.array([ratio] * score.n, pa.float64()),
                "label": [names[label] for label in score.labels.tolist()],
                "predicted": [names[label] for label in score.predicted.tolist()],
                "confidence": pa.array(score.confidence.tolist(), pa.float32()),
                "correct": score.correct.tolist(),
            }
        )
        for ratio, score in scores.items()
    ]
    table, content = pa.concat_tables(tables), io.BytesIO()
    if file.suffix.lower() == ".csv":
        csv.write_csv(table, content)
    else:
        parquet.write_table(table, content)
    write_whole(file, content.getvalue())
