"""Fetch files of a repository on the Hugging Face hub into the library's cache.

Endpoint, token, cache and offline mode are those of `huggingface_hub` and its variables
(HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). If the hub cannot be reached, what the cache holds
is used.
"""

import glob
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pcae_serve.bounded_file import read_regular
from pcae_serve.bounded_json import CONFIG_BYTES
from pcae_serve.errors import one_line
from pcae_serve.sources.names import FetchError, HubName
from pcae_serve.sources.snapshot import Choose, Snapshot, choose_files
from pcae_serve.version import install_command

#: Maximum time until the hub answers which files there are.
TIMEOUT_S = 30.0


def fetch(name: HubName, choose: Choose) -> Snapshot:
    """Fetch the chosen files. Raise FetchError with one line if that is not possible."""
    hub = open_library(name)
    try:
        info = hub.HfApi().model_info(name.repository, revision=name.revision, timeout=TIMEOUT_S)
    except Exception as error:  # the library raises a dozen types of its own
        if not _is_unreachable(error):
            raise explain(hub, name, error) from None
        return _cached(hub, name, choose, error)
    listed = frozenset(sibling.rfilename for sibling in info.siblings or ())
    files = _HubFiles(hub, name, str(info.sha), listed)
    chosen = choose_files(name, name.path, choose, files)
    try:
        folder = hub.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=list(map(glob.escape, chosen))
        )
    except Exception as error:
        raise explain(hub, name, error) from None
    found = Path(folder)
    return Snapshot(found, name.path, f"commit {found.name}", chosen)


def check_data_set(repository: str) -> None:
    """Ask the hub about a data set, before a library does that retries for long.

    Raise FetchError if the hub cannot be reached, unless offline mode is on.
    """
    import huggingface_hub as hub
    import huggingface_hub.constants

    if hub.constants.HF_HUB_OFFLINE:
        return
    try:
        hub.HfApi().dataset_info(repository, timeout=TIMEOUT_S)
    except Exception as error:  # it may refuse: the library that reads the data set says why
        if _is_unreachable(error):
            why = _describe_unreachable(hub, error)
            raise FetchError(
                f"{why}; with HF_HUB_OFFLINE=1, a copy in the cache is used if there is one"
            ) from None


@dataclass(frozen=True)
class _HubFiles:
    """The files of a commit on the hub."""

    hub: ModuleType
    name: HubName
    commit: str
    listed: frozenset[str]

    def has(self, path: str) -> bool:
        return path in self.listed

    def read(self, path: str) -> bytes:
        try:
            file = self.hub.hf_hub_download(self.name.repository, path, revision=self.commit)
            return read_regular(Path(file), CONFIG_BYTES)
        except Exception as error:
            raise explain(self.hub, self.name, error) from None


@dataclass(frozen=True)
class _CachedFiles:
    """The files of a commit in the library's cache."""

    folder: Path

    def has(self, path: str) -> bool:
        return (self.folder / path).is_file()

    def read(self, path: str) -> bytes:
        try:
            return read_regular(self.folder / path, CONFIG_BYTES)
        except OSError as error:
            raise FetchError(f"cannot read {self.folder / path} ({error.strerror})") from None


def _cached(hub: ModuleType, name: HubName, choose: Choose, reason: Exception) -> Snapshot:
    """Return what the cache holds. Raise FetchError if it lacks files."""
    why = _describe_unreachable(hub, reason)
    try:
        folder = hub.snapshot_download(
            name.repository,
            revision=name.revision,
            local_files_only=True,
            allow_patterns=[],  # else it asks for all files of the repository
        )
    except Exception:  # not in the cache
        raise FetchError(f"{name}: {why}, and it is not in the cache {_cache(hub)}") from None
    found = Path(folder)
    try:
        chosen = choose(_CachedFiles(found), name.path)
    except FetchError as error:
        raise FetchError(f"{name}: {why}, and the cache lacks files of it: {error}") from None
    note = f"{why}; the copy in the cache is used"
    return Snapshot(found, name.path, f"commit {found.name}", chosen, note)


def open_library(name: HubName) -> ModuleType:
    """Import huggingface_hub. Raise FetchError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ModuleNotFoundError:
        command = install_command("hub")
        raise FetchError(f"{name}: huggingface_hub is not installed: {command}") from None
    if not sys.stderr.isatty():  # bars are for people, and would break a log of JSON lines
        disable_progress_bars()
    return huggingface_hub


def _is_unreachable(error: BaseException) -> bool:
    """Return whether the hub did not answer, or is down, rather than refusing."""
    names = {each.__name__ for each in type(error).__mro__}
    return bool(names & {"OfflineModeIsEnabled", "TransportError"}) or _status(error) >= 500


def _status(error: BaseException) -> int:
    """Return the HTTP status of an error, or 0 if it has none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _describe_unreachable(hub: ModuleType, error: BaseException) -> str:
    if hub.constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    if status := _status(error):
        return f"the hub at {hub.constants.ENDPOINT} has failed (HTTP {status})"
    return f"cannot reach the hub at {hub.constants.ENDPOINT} ({one_line(error)})"


def explain(
    hub: ModuleType, name: HubName, error: BaseException, failed: str | None = None
) -> FetchError:
    """Return an error of the library as one line. failed: what cannot be done."""
    errors, page = hub.errors, f"{hub.constants.ENDPOINT}/{name.repository}"
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and len(chain) < 9:
        chain.append(cause)  # the first may only say that a file could not be fetched
    for each in chain:
        if isinstance(each, errors.GatedRepoError):
            return FetchError(
                f"{name} is gated; accept its conditions at {page} and set HF_TOKEN to a token of"
                " that account"
            )
        unknown = _status(each) == 401 and hub.get_token() is None
        if unknown or isinstance(each, errors.RepositoryNotFoundError):
            return FetchError(
                f"{name}: the hub has no model of this name, or it is private; check the name, or"
                " set HF_TOKEN to a token that may read it"
            )
        if isinstance(each, errors.RevisionNotFoundError):
            return FetchError(
                f"{name}: the repository has no branch, tag or commit {name.revision or 'main'!r}"
            )
        if isinstance(each, errors.HFValidationError):
            return FetchError(f"{name} is not a name on the hub: {one_line(each)}")
        if _is_unreachable(each):
            return FetchError(f"{name}: {_describe_unreachable(hub, each)}")
        if status := _status(each):
            what = "rejects the token in HF_TOKEN" if status == 401 else "refuses it"
            said = getattr(each, "server_message", None)
            why = f": {said.splitlines()[0]}" if said else ""
            return FetchError(f"{name}: the hub {what} (HTTP {status}{why})")
    reason = getattr(error, "strerror", None) or one_line(error)
    failed = failed or f"download it to the cache {_cache(hub)}"
    return FetchError(f"{name}: cannot {failed}: {reason}")


def _cache(hub: ModuleType) -> str:
    return str(hub.constants.HF_HUB_CACHE)
