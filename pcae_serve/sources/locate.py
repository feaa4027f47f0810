"""Turn the name of a model into a local folder or file, fetching what is not here."""

from collections.abc import Callable
from pathlib import Path

from pcae_serve import atomic
from pcae_serve.sources import hub, stores
from pcae_serve.sources.bundle_cache import keep_bundle
from pcae_serve.sources.cache_folder import cache_folder
from pcae_serve.sources.names import (
    HUB,
    FetchError,
    HubName,
    StoreUrl,
    implied_hub_name,
    is_remote,
    parse_remote,
)
from pcae_serve.sources.needed_files import bundle_files, checkpoint_files
from pcae_serve.sources.snapshot import Choose, Snapshot

#: Shows a line to the user: what was fetched, and of which commit.
Report = Callable[[str], None]


def locate_checkpoint(name: str, report: Report, choose: Choose = checkpoint_files) -> Path:
    """Return the folder or file of a checkpoint or teacher, fetched if `name` is not a path.

    choose: which files are fetched.

    A path that does not exist is returned as it is, unless it looks like OWNER/NAME: then the hub
    is asked. Raise FetchError, which names both possibilities in this case.
    """
    if is_remote(name):
        return _fetch(parse_remote(name), choose, report).place
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
        return _fetch(implied, choose, report).place
    except FetchError as error:
        raise FetchError(
            f"checkpoint not found: {name} does not exist here; as a name on the hub, {error}"
        ) from None


def locate_bundle(name: str, cache_dir: Path, report: Report) -> Path:
    """Return the folder of a bundle, kept in `cache_dir` if it was fetched.

    A bundle on the hub is named with hf://: a server must not fetch one because a path is mistyped.
    Raise FetchError.
    """
    if not is_remote(name):
        if (implied := implied_hub_name(name)) is not None:
            raise FetchError(
                f"no bundle at {name}: there is no such folder; create one with 'pcae-export"
                f" bundle', or write {implied} if you mean one on the Hugging Face hub"
            )
        return Path(name)
    found = _fetch(parse_remote(name), bundle_files, report, cache_dir)
    return keep_bundle(found.by_name(), cache_dir)


def _fetch(
    name: HubName | StoreUrl, choose: Choose, report: Report, cache_dir: Path | None = None
) -> Snapshot:
    if isinstance(name, HubName):
        found = hub.fetch(name, choose)
    else:
        found = stores.fetch(name, choose, cache_dir or cache_folder())
    if found.note:
        report(f"{name}: {found.note}")
    report(f"{name}, {found.version}")
    return found
