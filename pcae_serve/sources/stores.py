"""Fetch files at a URL (https, s3, gs) into the cache folder, through fsspec.

A store has no commits: what it holds is identified by what it says of each file (ETag, time, size).
Files that have not changed are not fetched again.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pcae_serve import atomic
from pcae_serve.bounded_json import CONFIG_BYTES
from pcae_serve.errors import one_line
from pcae_serve.sources.names import FetchError, StoreUrl
from pcae_serve.sources.snapshot import Choose, Snapshot, choose_files
from pcae_serve.version import install_command

FOLDER = "files"

#: fsspec's extra and the package in it, by scheme.
_EXTRAS = {
    "http": ("http", "aiohttp"),
    "https": ("http", "aiohttp"),
    "s3": ("s3", "s3fs"),
    "gs": ("gs", "gcsfs"),
    "gcs": ("gcs", "gcsfs"),
}
#: Properties of a file that change with its content, as the stores name them.
_VERSIONS = (
    "ETag", "etag", "Last-Modified", "LastModified", "Content-MD5", "md5Hash", "generation",
    "mtime", "updated", "created",
)  # fmt: skip


def fetch(url: StoreUrl, choose: Choose, cache_dir: Path) -> Snapshot:
    """Fetch the chosen files. Raise FetchError with one line if that is not possible."""
    store = _Store(url, *_open(url))
    try:
        chosen = choose_files(url, url.path, choose, store)
    except FetchError as error:
        raise FetchError(f"{error} (access denied)" if store.denied else str(error)) from None
    versions = {path: store.version(path) for path in chosen}
    key = hashlib.sha256(json.dumps([str(url), versions], sort_keys=True).encode())
    folder = cache_dir / FOLDER / key.hexdigest()
    try:
        if not (folder.is_dir() and all(versions.values())):
            _write(folder, chosen, store.download)
        return Snapshot(folder, url.path, f"SHA-256 {_digest(folder, chosen)}", chosen)
    except OSError as error:
        raise FetchError(
            f"{url}: cannot keep it in {cache_dir} ({error.strerror or one_line(error)})"
        ) from None


@dataclass
class _Store:
    """The files below a URL."""

    url: StoreUrl
    system: Any  # of fsspec, which has no types
    root: str
    denied: bool = False
    infos: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        if path not in self.infos:
            self.infos[path] = self._info(path)
        return self.infos[path] is not None

    def version(self, path: str) -> list[str]:
        """Return what identifies the content of a file, [] if nothing does."""
        info = self.infos[path] or {}
        found = [f"{name} {info[name]}" for name in _VERSIONS if info.get(name)]
        return [*found, f"size {info.get('size')}"] if found else []

    def read(self, path: str) -> bytes:
        with self._explained(path), self.system.open(self._place(path), "rb") as file:
            content: bytes = file.read(CONFIG_BYTES + 1)
        if len(content) > CONFIG_BYTES:
            raise FetchError(f"{self.url}: {path} is larger than {CONFIG_BYTES / 1e6:g} MB")
        return content

    def download(self, path: str, file: Path) -> None:
        with self._explained(path):
            self.system.get_file(self._place(path), str(file))

    def _info(self, path: str) -> dict[str, Any] | None:
        """Return what the store says of a file, or None if there is none or it is a folder."""
        try:
            info = dict(self.system.info(self._place(path)))
        except PermissionError:  # S3 answers so for missing files if they may not be listed
            self.denied = True
            return None
        except FileNotFoundError as error:
            cause = error.__cause__ if self.url.scheme in ("http", "https") else None
            status = getattr(cause, "status", 404 if cause is None else 0)
            if cause is not None and not 400 <= status < 500:  # HTTP has this error for all
                raise self._error(path, cause) from None
            self.denied = self.denied or status in (401, 403)
            return None
        except Exception as error:  # each store has types of its own
            raise self._error(path, error) from None
        return info if info.get("type") == "file" else None

    def _place(self, path: str) -> str:
        return f"{self.root}/{path}{self.url.query}"

    @contextlib.contextmanager
    def _explained(self, path: str) -> Any:
        """Raise an error of the store as FetchError; those of the disk pass."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is not None and not _is_of_store(error):
                raise
            raise self._error(path, error) from None
        except Exception as error:
            raise self._error(path, error) from None

    def _error(self, path: str, error: BaseException) -> FetchError:
        reason = one_line(error)
        if self.url.query:  # a secret
            reason = reason.replace(self.url.query, "")
        reason = reason.replace(self.url.root, self.url.public_root)
        return FetchError(f"{self.url}: cannot fetch {path} ({type(error).__name__}: {reason})")


def _is_of_store(error: OSError) -> bool:
    return isinstance(error, FileNotFoundError | PermissionError | ConnectionError | TimeoutError)


def _open(url: StoreUrl) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the root in it. Raise FetchError."""
    try:
        import fsspec  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise FetchError(f"{url}: fsspec is not installed: {install_command('hub')}") from None
    extra, package = _EXTRAS[url.scheme]
    try:
        system, root = fsspec.core.url_to_fs(url.root)
    except ImportError:
        raise FetchError(
            f"{url}: {package} is not installed: pip install 'fsspec[{extra}]'"
        ) from None
    except Exception as error:
        raise FetchError(f"{url}: cannot open it ({type(error).__name__}: {error})") from None
    system.invalidate_cache()  # a reload asks again
    return system, str(root).rstrip("/")


def _write(folder: Path, paths: list[str], download: Callable[[str, Path], None]) -> None:
    """Download all files into a folder that appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for path in paths:
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            download(path, fresh / path)
        atomic.replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _digest(folder: Path, paths: list[str]) -> str:
    """Return the SHA-256 of a file; of several, that of the lines that sha256sum prints of them."""
    digests = {}
    for path in sorted(paths):
        with (folder / path).open("rb") as file:
            digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(paths) == 1:
        return digests[paths[0]]
    lines = "".join(f"{digest}  {path}\n" for path, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()
