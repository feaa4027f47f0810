"""Results as a parquet file, with the columns of the CSV file. Needs pyarrow."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pcae_serve.errors import PcaeError, one_line
from pcae_serve.local.row_formats import Row
from pcae_serve.version import install_command

#: Rows of a row group.
GROUP = 100_000


def require_pyarrow() -> None:
    """Raise PcaeError if pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise PcaeError(f"a .parquet file needs pyarrow: {install_command('parquet')}") from None


def read_files(path: Path) -> Iterator[str]:
    """Yield the column `file`. Raises PcaeError if it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(GROUP, columns=["file"]):
                yield from batch.column(0).to_pylist()
    except (OSError, pyarrow.ArrowException, IndexError) as error:
        raise PcaeError(
            f"{path} cannot be read: {one_line(error)}; --overwrite begins a new file"
        ) from None


def write(path: Path, rows: Iterable[Row], top_k: int) -> None:
    """Write rows after those that the file has already, atomically. Raises OSError."""
    import pyarrow
    import pyarrow.parquet

    schema = _schema(top_k)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                if path.exists() and path.stat().st_size:
                    with pyarrow.parquet.ParquetFile(path) as before:
                        for batch in before.iter_batches(GROUP):
                            writer.write_batch(batch.cast(schema))
                source = iter(rows)
                while group := list(islice(source, GROUP)):
                    flat = [row.flat(top_k) for row in group]
                    writer.write_table(pyarrow.Table.from_pylist(flat, schema))
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _schema(top_k: int) -> Any:
    import pyarrow

    kinds = {"label": pyarrow.string(), "index": pyarrow.int32(), "probability": pyarrow.float64()}
    columns = Row("", "", ()).flat(top_k)
    return pyarrow.schema(
        [(name, kinds.get(name.partition("_")[0], pyarrow.string())) for name in columns]
    )
