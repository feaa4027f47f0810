"""Opens a data set by what a person calls it: class folders, parquet, tar shards or a hub name.

All reading is done by Hugging Face `datasets`, whose cache and locks let several processes open the
same source at once. It knows nothing of columns, pixels or labels.
"""

import glob
import tarfile
from pathlib import Path
from typing import Literal, overload

import datasets  # type: ignore[import-untyped]

from pcae_serve.errors import PcaeError, one_line

#: What `datasets` raises on a source that is missing, damaged or of no kind it knows; IndexError
#: is its answer to an empty tar file.
READ_ERRORS = (
    OSError,
    ValueError,
    IndexError,
    tarfile.TarError,
    datasets.exceptions.DatasetsError,
)

#: Files that are given by name or pattern, and the builder of `datasets` that reads them.
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


class DataError(PcaeError):
    """The data set cannot be read, or has not what was asked for."""


@overload
def open_source(source: str, split: str, stream: Literal[False] = False) -> datasets.Dataset: ...


@overload
def open_source(source: str, split: str, stream: Literal[True]) -> datasets.IterableDataset: ...


def open_source(
    source: str, split: str, stream: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of `source` at `split`, read as they come where `stream`.

    source: class folders, a folder of parquet or of tar shards, .parquet or .tar files (one, or a
    pattern such as shards/*.tar: whatever split is asked for), or a hub name. Raises DataError.
    """
    options = {"streaming": True} if stream else {}
    builder = BUILDERS.get(Path(source).suffix)
    try:
        if builder is None:
            return datasets.load_dataset(source, split=split, **options)
        return datasets.load_dataset(builder, data_files={split: source}, split=split, **options)
    except READ_ERRORS as error:
        reason = one_line(error)
        raise DataError(f"cannot read split {split!r} of data set {source!r}: {reason}") from None


def title(source: str, split: str) -> str:
    """What the data set is called in messages and on the model card."""
    path = Path(source)
    name = f"{path.parent.name}/{path.name}" if glob.has_magic(path.name) else path.name
    return f"{name}/{split}"
