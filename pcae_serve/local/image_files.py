"""The image files that names on a command line stand for: files, folders and patterns."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pcae_serve.errors import PcaeError

#: Suffixes of the files that are taken from a folder. The type is detected from the content.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp"),
    *(".gif", ".bmp", ".dib", ".tif", ".tiff"),
)
#: Suffixes named in a message about files that were left out, at most.
MAX_NAMED = 5


class ImageFiles:
    """Names of image files, in the order of the arguments; those of a folder in order of names.

    problems: arguments that stand for no image, and why. left_out: how many files of folders have
    another suffix, by suffix.
    """

    def __init__(self, names: Iterable[str], output: Path | None = None) -> None:
        """Expand names. Raises PcaeError if nothing is left.

        A file that is named itself is taken as it is, even if it does not exist. output: a folder
        that is left out, because the run writes images to it.
        """
        self._output = output
        self.left_out, self.problems = Counter[str](), dict[str, str]()
        self.names = [each for name in names for each in self._expand(name)]
        if not self.names:
            name, problem = next(iter(self.problems.items()))
            raise PcaeError(f"no images: {name}: {problem}")

    def left_out_line(self) -> str | None:
        """Return in one line what was left out, or None."""
        if not self.left_out:
            return None
        named = [f"{count} {suffix}" for suffix, count in self.left_out.most_common(MAX_NAMED)]
        more = ", …" if len(self.left_out) > MAX_NAMED else ""
        total = self.left_out.total()
        return f"{total:,} other file{'s' * (total != 1)} left out: {', '.join(named)}{more}"

    def _expand(self, name: str) -> Iterator[str]:
        if os.path.isdir(name):  # noqa: PTH112  # a Path would normalise the name
            yield from self._folder(name)
        elif glob.has_magic(name) and not os.path.lexists(name):
            found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
            if not found:
                self.problems[name] = "no file matches this pattern"
            for each in found:
                yield from self._expand(each)
        else:
            yield name

    def _folder(self, folder: str) -> Iterator[str]:
        """Yield the images of a folder and of the folders in it, except hidden ones."""
        empty = True
        for path, folders, files in os.walk(folder, onerror=self._unreadable):
            folders[:] = sorted(each for each in folders if not self._is_left_out(path, each))
            for file in sorted(files):
                suffix = Path(file).suffix.lower()
                if file.startswith("."):
                    continue
                if suffix in SUFFIXES:
                    empty = False
                    yield os.path.join(path, file)  # noqa: PTH118  # a Path would normalise it
                else:
                    self.left_out[suffix or "without a suffix"] += 1
        if empty:
            self.problems.setdefault(folder, "a folder without images")

    def _is_left_out(self, path: str, folder: str) -> bool:
        if folder.startswith("."):
            return True
        output = self._output
        return output is not None and output.exists() and output.samefile(Path(path, folder))

    def _unreadable(self, error: OSError) -> None:
        self.problems[str(error.filename)] = str(error.strerror)
