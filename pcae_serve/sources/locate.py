"""Turn the name of a model into a local folder or file, fetching what is not here."""

from collections.abc import Callable
from pathlib import Path

from pcae_serve import atomic
from pcae_serve.sources import hub
from pcae_serve.sources.names import (
    HUB,
    FetchError,
    HubName,
    implied_hub_name,
    is_remote,
    parse_hub_name,
)
from pcae_serve.sources.needed_files import checkpoint_files

#: Shows a line to the user: what was fetched, and of which commit.
Report = Callable[[str], None]


def locate_checkpoint(name: str, report: Report) -> Path:
    """Return the folder or file of a checkpoint or teacher, fetched if `name` is not a path.

    A path that does not exist is returned as it is, unless it looks like OWNER/NAME: then the hub
    is asked. Raise FetchError, which names both possibilities in this case.
    """
    if is_remote(name):
        return _fetch_checkpoint(parse_hub_name(name), report)
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
        return _fetch_checkpoint(implied, report)
    except FetchError as error:
        raise FetchError(
            f"checkpoint not found: {name} does not exist here; as a name on the hub, {error}"
        ) from None


def _fetch_checkpoint(name: HubName, report: Report) -> Path:
    found = hub.fetch(name, checkpoint_files)
    if found.note:
        report(f"{name}: {found.note}")
    report(f"{name}, commit {found.commit}")
    return found.folder / name.path
