"""Rows of results as records of a file that is only appended to: CSV and JSON lines.

A record ends with a line feed. What follows the last complete record, after a crash or on a full
disk, is found by `complete_records` and can be cut off.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

from pcae_serve.schemas import Classification, Prediction


@dataclass(frozen=True)
class Row:
    """The answer to one file."""

    file: str
    tier: str
    predictions: tuple[Prediction, ...]

    @classmethod
    def of(cls, file: str, answer: Classification) -> "Row":
        return cls(file, answer.tier, tuple(answer.predictions))

    def flat(self, top_k: int) -> dict[str, str | int | float | None]:
        """Return the row as columns; the columns of missing classes are None."""
        columns: dict[str, str | int | float | None] = {"file": self.file, "tier": self.tier}
        for i in range(top_k):
            each = self.predictions[i] if i < len(self.predictions) else None
            end = f"_{i + 1}" if i else ""
            columns[f"label{end}"] = None if each is None else each.label
            columns[f"index{end}"] = None if each is None else each.index
            columns[f"probability{end}"] = None if each is None else each.probability
        return columns


class Record(NamedTuple):
    """A complete record and the offset of its end."""

    content: bytes
    end: int


class RowFormat(Protocol):
    """How rows become records."""

    @property
    def header(self) -> bytes:
        """The record that a file begins with; empty if there is none."""
        ...

    def encode(self, row: Row) -> bytes:
        """Return the record of a row."""
        ...

    def file_of(self, record: bytes) -> str:
        """Return the file that a record is about. Raises ValueError if it is not a record."""
        ...

    def complete_records(self, file: BinaryIO) -> Iterator[Record]:
        """Yield the complete records of a file, from its beginning."""
        ...


class JsonLines:
    """A JSON object on each line: file, tier, predictions."""

    header = b""

    def encode(self, row: Row) -> bytes:
        predictions = [each.model_dump() for each in row.predictions]
        line = {"file": row.file, "tier": row.tier, "predictions": predictions}
        return json.dumps(line).encode() + b"\n"

    def decode(self, record: bytes) -> Row:
        """Return the row of a record. Raises ValueError if it is not one."""
        try:
            line = json.loads(record)
            predictions = tuple(Prediction(**each) for each in line["predictions"])
            return Row(str(line["file"]), str(line["tier"]), predictions)
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from None

    def file_of(self, record: bytes) -> str:
        line = json.loads(record)
        if not isinstance(line, dict) or not isinstance(line.get("file"), str):
            raise ValueError("no file")
        return str(line["file"])

    def complete_records(self, file: BinaryIO) -> Iterator[Record]:
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                yield Record(line, end)


class Csv:
    """Comma-separated columns; further classes are in label_2, index_2, probability_2 and so on."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self.header = _csv_record(list(Row("", "", ()).flat(top_k)))

    def encode(self, row: Row) -> bytes:
        return _csv_record(list(row.flat(self._top_k).values()))

    def file_of(self, record: bytes) -> str:
        try:
            [fields] = csv.reader(io.StringIO(record.decode(), newline=""), strict=True)
        except csv.Error as error:
            raise ValueError(str(error)) from None
        if len(fields) != 2 + 3 * self._top_k:
            raise ValueError(f"{len(fields)} columns")
        return fields[0]

    def complete_records(self, file: BinaryIO) -> Iterator[Record]:
        """Yield records; a line feed between quotes belongs to a field."""
        end, lines = 0, list[bytes]()
        quoted = False
        for line in file:
            lines.append(line)
            quoted ^= line.count(b'"') % 2 == 1
            if line.endswith(b"\n") and not quoted:
                record = b"".join(lines)
                end += len(record)
                yield Record(record, end)
                lines.clear()


def _csv_record(values: list[str | int | float | None]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()
