"""Control groups that are made up."""

from pathlib import Path


def group(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Return where they are mounted, and the file that lists this process's groups."""
    for name, content in files.items():
        file = root / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (root / "membership").write_text(membership)
    return root / "mount", root / "membership"
