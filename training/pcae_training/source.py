"""Open tables by name: parquet files, tar shards or a name on the hub.

Class folders are not read here (see `class_folders`). Reads through Hugging Face `datasets`, whose
cache and locks let several processes open the same source at once.
"""

import glob
import re
import tarfile
from pathlib import Path
from typing import Literal, overload

import datasets  # type: ignore[import-untyped]

from pcae_serve.errors import PcaeError, one_line
from pcae_serve.sources.hub import check_data_set
from pcae_serve.sources.names import FetchError

#: Raised by `datasets` if a source is missing, damaged or of an unknown kind; IndexError is raised
#: for an empty tar file.
READ_ERRORS = (
    OSError,
    ValueError,
    IndexError,
    tarfile.TarError,
    datasets.exceptions.DatasetsError,
)

#: What may be a name on the hub: OWNER/NAME or NAME.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

#: Suffixes of files given by name or pattern, and the builder of `datasets` that reads them.
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


class DataError(PcaeError):
    """The data set cannot be read, or lacks what was asked for."""


@overload
def open_source(source: str, split: str, stream: Literal[False] = False) -> datasets.Dataset: ...


@overload
def open_source(source: str, split: str, stream: Literal[True]) -> datasets.IterableDataset: ...


def open_source(
    source: str, split: str, stream: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Open the rows of `source` at `split`, to be read sequentially if `stream`.

    source: a folder of parquet files or tar shards, .parquet or .tar files (one, or a pattern such
    as shards/*.tar, which is used for any split), or a name on the hub. Raise DataError if it
    cannot be read.
    """
    options = {"streaming": True} if stream else {}
    builder = BUILDERS.get(Path(source).suffix)
    if builder is None and not _HUB_NAME.fullmatch(source) and not Path(source).exists():
        raise DataError(
            f"cannot read split {split!r} of data set {source!r}: there is no such folder or file"
        )
    try:
        if builder is None:
            if not Path(source).exists():
                check_data_set(source)
            return datasets.load_dataset(source, split=split, **options)
        return datasets.load_dataset(builder, data_files={split: source}, split=split, **options)
    except (*READ_ERRORS, FetchError) as error:
        reason = one_line(error)
        if builder is None and not Path(source).exists():
            reason = f"there is no such folder, and as a name on the hub: {reason}"
        raise DataError(f"cannot read split {split!r} of data set {source!r}: {reason}") from None


def title(source: str, split: str) -> str:
    """Return the data set's name for messages and the model card."""
    path = Path(source)
    name = f"{path.parent.name}/{path.name}" if glob.has_magic(path.name) else path.name
    return f"{name}/{split}"
