"""Keep fetched bundles in the cache folder, each under the digest of its manifest.

A bundle's files must lie in its folder, and those in the hub's cache are links out of it. On one
file system they are linked, so that they take no space twice; otherwise they are copied.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pcae_serve import atomic
from pcae_serve.bounded_file import read_regular
from pcae_serve.bounded_json import CONFIG_BYTES
from pcae_serve.bundle.manifest import MANIFEST
from pcae_serve.sources.names import FetchError

FOLDER = "bundles"


def keep_bundle(files: Mapping[str, Path], cache_dir: Path) -> Path:
    """Return the folder in the cache of the bundle with these files, by their names in it.

    Raise FetchError if it cannot be written; then nothing incomplete is left.
    """
    try:
        digest = hashlib.sha256(read_regular(files[MANIFEST], CONFIG_BYTES)).hexdigest()
        target = cache_dir / FOLDER / digest
        if not _is_complete(target, files):
            _write(target, files)
    except OSError as error:
        raise FetchError(
            f"cannot keep the bundle in {cache_dir} ({error.strerror or error}); choose another"
            " --cache-dir"
        ) from None
    return target


def _write(target: Path, files: Mapping[str, Path]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh.chmod(0o755)  # mkdtemp restricts it to the owner
        for name, source in files.items():
            file = fresh / name
            file.parent.mkdir(parents=True, exist_ok=True)
            _link(source.resolve(), file)
        try:
            atomic.replace_folder(fresh, target)
        except OSError:
            if not _is_complete(target, files):  # else another process was faster
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _link(source: Path, file: Path) -> None:
    with contextlib.suppress(OSError):  # another file system, or one without links
        os.link(source, file)
        return
    shutil.copyfile(source, file)


def _is_complete(target: Path, files: Mapping[str, Path]) -> bool:
    """Return whether all files are there; their hashes are checked when the bundle is read."""
    try:
        return all(
            (target / name).stat().st_size == source.stat().st_size
            for name, source in files.items()
        )
    except OSError:
        return False
