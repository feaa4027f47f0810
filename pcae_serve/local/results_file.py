"""A file of results that a later run continues: finished rows are kept, settings must be the same.

results.csv            header and rows; an incomplete last row is cut off by the next run
results.csv.run.json   the settings of the run
results.parquet.part   rows of a run that has not ended; then they become results.parquet
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from pcae_serve import atomic
from pcae_serve.errors import PcaeError
from pcae_serve.local import parquet_file
from pcae_serve.local.row_formats import Csv, JsonLines, Row, RowFormat

Settings = Mapping[str, str | int | float | bool | None]

SUFFIXES = (".csv", ".jsonl", ".parquet")
#: Seconds of rows that may be lost if the process is killed.
FLUSH_S = 1.0
#: Version of the settings file and of the rows.
VERSION = 1


class ResultsFile:
    """Rows by file name. Use it as a context manager; only one process may write it at a time.

    `finished` are the files whose rows were there already.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        top_k: int,
        *,
        overwrite: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open or create the file. Raises PcaeError with a one-line reason.

        settings: of the run; those of an existing file must be equal. overwrite: begin a new file.
        """
        self.path, self._top_k, self._clock = path, top_k, clock
        self._parquet = check_suffix(path) == ".parquet"
        self._format: RowFormat = Csv(top_k) if path.suffix.lower() == ".csv" else JsonLines()
        self._rows_path = _with_end(path, ".part") if self._parquet else path
        try:
            self._file = self._open(settings, overwrite)
            try:
                self.finished = self._read_finished()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise PcaeError(f"--out {path}: {error.strerror}") from None
        self._flushed_s = clock()

    def write(self, row: Row) -> None:
        """Append a row. Raises PcaeError if the disk is full."""
        try:
            self._file.write(self._format.encode(row))
            if self._clock() - self._flushed_s >= FLUSH_S:
                self._file.flush()
                self._flushed_s = self._clock()
        except OSError as error:
            raise PcaeError(f"--out {self.path}: {error.strerror}") from None

    def finish(self) -> None:
        """Complete the file: a parquet file is written now. Raises PcaeError."""
        try:
            self._file.flush()
            if self._parquet:
                with self._rows_path.open("rb") as rows:
                    parquet_file.write(self.path, _decoded(rows), self._top_k)
                self._rows_path.unlink()
        except OSError as error:
            raise PcaeError(f"--out {self.path}: {error.strerror}") from None

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
        except OSError as error:  # the rows that were not written are computed again
            if kind is None:
                raise PcaeError(f"--out {self.path}: {error.strerror}") from None

    def _open(self, settings: Settings, overwrite: bool) -> BinaryIO:
        """Check the settings, and open the file of rows for reading and appending."""
        existing = [p for p in {self.path, self._rows_path} if p.exists() and p.stat().st_size]
        beside = _with_end(self.path, ".run.json")
        if existing and not overwrite:
            self._check_settings(beside, settings)
        file = self._rows_path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise PcaeError(f"--out {self.path}: another process is writing this file") from None
        try:
            if overwrite or not existing:
                file.truncate(0)
                if self._parquet:
                    self.path.unlink(missing_ok=True)
                content = json.dumps({"version": VERSION, **settings}, indent=1).encode()
                atomic.write_file(beside, content + b"\n")
        except OSError:
            file.close()
            raise
        return file

    def _check_settings(self, beside: Path, settings: Settings) -> None:
        """Raise PcaeError unless the file was written with these settings."""
        choice = "choose another name, or --overwrite to begin a new file"
        try:
            found = json.loads(beside.read_bytes())
        except FileNotFoundError:
            raise PcaeError(
                f"--out {self.path} exists and cannot be continued, because {beside.name} is"
                f" missing; {choice}"
            ) from None
        except ValueError:
            raise PcaeError(f"{beside} is damaged; {choice}") from None
        wanted = {"version": VERSION, **settings}
        if not isinstance(found, dict):
            raise PcaeError(f"{beside} is damaged; {choice}")
        for name in {**wanted, **found}:
            if (before := found.get(name)) != (now := wanted.get(name)):
                raise PcaeError(
                    f"--out {self.path} exists and was written with {name} {_shown(before)}, not"
                    f" {_shown(now)}; use the same settings, {choice}"
                )

    def _read_finished(self) -> set[str]:
        """Return the files whose rows are there, and cut off what follows the last of them."""
        end, finished, header = 0, set[str](), self._format.header
        self._file.seek(0)
        try:
            for record in self._format.complete_records(self._file):
                if end or not header:
                    finished.add(self._format.file_of(record.content))
                elif record.content != header:
                    raise ValueError("another header")
                end = record.end
        except ValueError as error:
            raise PcaeError(
                f"--out {self.path} is damaged after byte {end:,} ({error}); --overwrite begins a"
                " new file"
            ) from None
        self._file.truncate(end)
        self._file.seek(0, 2)
        if not end:
            self._file.write(header)
            self._file.flush()
        if self._parquet and self.path.exists() and self.path.stat().st_size:
            finished.update(parquet_file.read_files(self.path))
        return finished


def check_suffix(path: Path) -> str:
    """Return the suffix of a file of results, which is its format. Raises PcaeError."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise PcaeError(
            f"--out {path}: unknown suffix {suffix!r}; use {', '.join(SUFFIXES[:-1])} or"
            f" {SUFFIXES[-1]}"
        )
    if suffix == ".parquet":
        parquet_file.require_pyarrow()
    return suffix


def _decoded(rows: BinaryIO) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines."""
    format_ = JsonLines()
    for record in format_.complete_records(rows):
        yield format_.decode(record.content)


def _with_end(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
