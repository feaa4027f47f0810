"""What a fetch returns: files of a repository in a local folder, at one version."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pcae_serve.sources.names import FetchError
from pcae_serve.sources.needed_files import Files

#: Chooses the files to fetch, of those at a path in a repository. Raises FetchError if it lacks
#: some.
Choose = Callable[[Files, str], list[str]]


@dataclass(frozen=True)
class Snapshot:
    """The chosen files of a repository, by their paths in it."""

    folder: Path  # of the repository; files may be links
    path: str  # of the model in it, a folder or a file; "" for the whole
    version: str  # such as "commit 0123…"
    files: list[str]
    note: str = ""  # on where they come from, if it is not where the name points to

    @property
    def place(self) -> Path:
        """Return the folder or file of the model."""
        return self.folder / self.path

    def by_name(self) -> dict[str, Path]:
        """Return the files by their names in `place`, a folder."""
        files = [self.folder / file for file in self.files]
        return {file.relative_to(self.place).as_posix(): file for file in files}


def choose_files(name: object, path: str, choose: Choose, files: Files) -> list[str]:
    """Return the chosen files. Raise FetchError, naming the model, if some are missing."""
    try:
        return choose(files, path)
    except FetchError as error:
        message = str(error)
        raise FetchError(message if str(name) in message else f"{name}: {message}") from None
