"""Turn the name of a model into a local folder or file, fetching what is not here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pcae_serve import atomic
from pcae_serve.sources import hub
from pcae_serve.sources.bundle_cache import keep_bundle
from pcae_serve.sources.names import (
    HUB,
    FetchError,
    HubName,
    implied_hub_name,
    is_remote,
    parse_hub_name,
)
from pcae_serve.sources.needed_files import bundle_files, checkpoint_files

#: Shows a line to the user: what was fetched, and of which commit.
Report = Callable[[str], None]


def locate_checkpoint(name: str, report: Report) -> Path:
    """Return the folder or file of a checkpoint or teacher, fetched if `name` is not a path.

    A path that does not exist is returned as it is, unless it looks like OWNER/NAME: then the hub
    is asked. Raise FetchError, which names both possibilities in this case.
    """
    if is_remote(name):
        return _fetch(parse_hub_name(name), checkpoint_files, report).place
    implied = implied_hub_name(name)
    path = Path(name)
    if implied is None or atomic.previous(path).exists():  # a writer was killed: a reader finds it
        return path
    if path.parent.is_dir():  # a mistyped path, such as runs/lost
        raise FetchError(
            f"checkpoint not found: {name} does not exist; if you mean a model on the Hugging Face"
            f" hub, write {HUB}{name}"
        )
    try:
        return _fetch(implied, checkpoint_files, report).place
    except FetchError as error:
        raise FetchError(
            f"checkpoint not found: {name} does not exist here; as a name on the hub, {error}"
        ) from None


def locate_bundle(name: str, cache_dir: Path, report: Report) -> Path:
    """Return the folder of a bundle, kept in `cache_dir` if it was fetched.

    Only hf:// names a bundle on the hub: a server must not fetch one because of a mistyped path.
    Raise FetchError.
    """
    if not is_remote(name):
        if (implied := implied_hub_name(name)) is not None:
            raise FetchError(
                f"no bundle at {name}: there is no such folder; create one with 'pcae-export"
                f" bundle', or write {implied} if you mean one on the Hugging Face hub"
            )
        return Path(name)
    found = _fetch(parse_hub_name(name), bundle_files, report)
    return keep_bundle(found.by_name(), cache_dir)


@dataclass(frozen=True)
class _Fetched:
    place: Path  # folder or file
    folder: Path  # of the whole repository
    files: list[str]  # paths in it

    def by_name(self) -> dict[str, Path]:
        """Return the files by their names in `place`, a folder."""
        files = [self.folder / file for file in self.files]
        return {file.relative_to(self.place).as_posix(): file for file in files}


def _fetch(name: HubName, choose: hub.Choose, report: Report) -> _Fetched:
    found = hub.fetch(name, choose)
    if found.note:
        report(f"{name}: {found.note}")
    report(f"{name}, commit {found.commit}")
    return _Fetched(found.folder / name.path, found.folder, found.files)
