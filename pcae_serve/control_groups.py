"""The control groups of this process, whose limits apply to it: version 1, version 2 or both."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Where control groups are mounted, and the file that lists this process's groups.
MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Group(NamedTuple):
    """The folder of one group, and which version's files it has."""

    folder: Path
    version: int

    def read(self, name: str) -> str | None:
        """Return the first line of one of the group's files, or None if it cannot be read."""
        return next(iter(_lines(self.folder / name)), None)


def groups(controller: str, mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> Iterator[Group]:
    """Yield this process's groups of a controller, such as "cpu", and those above them.

    Some folders may not exist: in a container, the path may be that of the host.
    """
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for root in (mount, mount / "unified"):
                yield from (Group(folder, 2) for folder in _upwards(root, path))
        elif controller in controllers.split(","):
            root = mount / controllers if (mount / controllers).is_dir() else mount / controller
            yield from (Group(folder, 1) for folder in _upwards(root, path))


def _upwards(mount: Path, path: str) -> list[Path]:
    """Return the group's folder and those above it, up to the mount."""
    folder = mount / path.strip("/")
    return [each for each in (folder, *folder.parents) if each == mount or mount in each.parents]


def _lines(file: Path) -> list[str]:
    """Return a file's lines, or none if it does not exist, as on other systems."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
