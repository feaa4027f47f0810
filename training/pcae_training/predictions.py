"""Write the answer to each image as a table, Parquet or CSV."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from pcae_serve.errors import PcaeError
from pcae_training.label_score import LabelScore
from pcae_training.output import check_writable, write_whole
from pcae_training.task import AnyScore

SUFFIXES = (".parquet", ".csv")


def check_predictions(file: Path) -> None:
    """Raise PcaeError if `write_predictions` cannot write `file`."""
    if file.suffix.lower() not in SUFFIXES:
        raise PcaeError(f"--predictions {file} must end with {' or '.join(SUFFIXES)}")
    check_writable(file)


def write_predictions(
    file: Path,
    scores: Mapping[float, AnyScore],
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
                **_answers(score, names, as_text=file.suffix.lower() == ".csv"),
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


def _answers(score: AnyScore, names: Sequence[str], as_text: bool) -> dict[str, Any]:
    """Return the columns of labels and answers.

    as_text: lists as JSON, for files without lists.
    """
    if not isinstance(score, LabelScore):
        return {
            "label": [names[label] for label in score.labels.tolist()],
            "predicted": [names[label] for label in score.predicted.tolist()],
            "confidence": pa.array(score.confidence.tolist(), pa.float32()),
            "correct": score.correct.tolist(),
        }
    columns: dict[str, list[Any]] = {
        "labels": [_chosen(names, row) for row in score.labels.tolist()],
        "predicted": [_chosen(names, row) for row in score.given.tolist()],
        "probabilities": [
            {name: round(value, 6) for name, value in zip(names, row, strict=True)}
            for row in score.probabilities.tolist()
        ],
    }
    if as_text:
        return {name: [json.dumps(value) for value in column] for name, column in columns.items()}
    return columns


def _chosen(names: Sequence[str], row: Sequence[bool]) -> list[str]:
    return [name for name, chosen in zip(names, row, strict=True) if chosen]
