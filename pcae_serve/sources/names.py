"""Parse names of models: a local path, a name on the Hugging Face hub or a URL."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import BeforeValidator, PlainSerializer

from pcae_serve.errors import PcaeError

HUB = "hf://"
#: Schemes of stores that hold a model's folder or file under a URL.
STORES = ("https", "http", "s3", "gs", "gcs")

#: Suffixes of files, which names of repositories do not have (they may contain dots).
_FILE_SUFFIXES = (
    ".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".onnx", ".json", ".npz", ".h5", ".txt", ".tar",
    ".zip",
)  # fmt: skip

_REPOSITORY = r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)"
#: Branch, tag or commit; a slash in a branch is written %2F, except in references of the hub.
_REVISION = r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@\s]+))?"
_HUB_NAME = re.compile(rf"{HUB}{_REPOSITORY}{_REVISION}(?:/(?P<path>[^@]*?))?/?", re.ASCII)
_IMPLIED = re.compile(rf"{_REPOSITORY}{_REVISION}", re.ASCII)


def public_name(name: str) -> str:
    """Return a name for records: that of a URL without query and password, which are secrets."""
    return str(parse_remote(name)) if is_remote(name) else name


#: A flag's value that names a model. Not a Path, which would make hf:/ of hf://. As JSON, which is
#: what runs record, it has no secrets.
ModelName = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    PlainSerializer(public_name, return_type=str, when_used="json"),
]


class FetchError(PcaeError):
    """A model cannot be fetched from where its name points to."""


@dataclass(frozen=True)
class HubName:
    """A repository on the hub, or a file or folder in one."""

    repository: str  # OWNER/NAME
    revision: str | None = None  # branch, tag or commit; None: the main branch
    path: str = ""  # inside the repository

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.repository}{revision}" + (f"/{self.path}" if self.path else "")


def is_remote(name: str) -> bool:
    """Return whether a name says by its scheme that it is not a local path."""
    return name.startswith((HUB, *(f"{scheme}://" for scheme in STORES)))


@dataclass(frozen=True)
class StoreUrl:
    """The URL of a folder, or of a file in one."""

    root: str  # of the folder, without a slash at its end
    path: str = ""  # name of the file
    query: str = ""  # of the file, such as a signature

    @property
    def scheme(self) -> str:
        return self.root.partition("://")[0]

    def __str__(self) -> str:
        """Return the URL without its query and password, which are secrets."""
        return f"{self.public_root}/{self.path}" if self.path else self.public_root

    @property
    def public_root(self) -> str:
        """Return the folder's URL without user and password."""
        return re.sub(r"://[^/]*@", "://", self.root)


def parse_remote(text: str) -> HubName | StoreUrl:
    """Parse what `is_remote` accepts. Raise FetchError if it names no model."""
    if text.startswith(HUB):
        return parse_hub_name(text)
    location, mark, query = text.partition("?")
    location = location.rstrip("/")
    folder, _, file = location.rpartition("/")
    if folder.endswith(":/") or "://" not in location:  # a host or bucket alone
        folder, file = location, ""
    if file.lower().endswith(_FILE_SUFFIXES):
        return StoreUrl(folder, file, mark + query)
    if query:
        raise FetchError(f"{location} is a folder, and has a query; give the URL of a file in it")
    return StoreUrl(location)


def parse_hub_name(text: str) -> HubName:
    """Parse hf://OWNER/NAME[@REVISION][/PATH]. Raise FetchError if it is something else."""
    match = _HUB_NAME.fullmatch(text)
    if match is None or text.startswith((f"{HUB}datasets/", f"{HUB}spaces/")):
        raise FetchError(
            f"{text} is not a model on the hub; write {HUB}OWNER/NAME, {HUB}OWNER/NAME@REVISION or"
            f" {HUB}OWNER/NAME/PATH"
        )
    name = _name(match, match["path"] or "")
    if any(part in ("", ".", "..") for part in name.path.split("/")) and name.path:
        raise FetchError(f"{text}: {name.path!r} is not a path inside a repository")
    return name


def implied_hub_name(text: str) -> HubName | None:
    """Return the hub name that OWNER/NAME[@REVISION] may be, or None if it can only be a path.

    What exists is a path, and so is what has a file's suffix or another number of slashes.
    """
    match = _IMPLIED.fullmatch(text)
    if match is None or text.lower().endswith(_FILE_SUFFIXES) or os.path.lexists(text):
        return None
    return _name(match, "")


def local_name(text: str) -> str:
    """Return a name for what is made from a model, such as NAME for hf://OWNER/NAME@REVISION."""
    if not is_remote(text):
        return text
    name = parse_remote(text)
    whole = name.repository if isinstance(name, HubName) else name.root
    return (name.path or whole).rpartition("/")[2]


def _name(match: re.Match[str], path: str) -> HubName:
    revision = match["revision"]
    return HubName(match["repository"], revision and unquote(revision), path)
