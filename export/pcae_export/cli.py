"""pcae-export: turn checkpoints into bundles. The entry point, which needs no torch to start."""

import sys
from collections.abc import Sequence

from pcae_serve.command import run
from pcae_serve.version import __version__, install_command


def start(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    if list(argv) == ["--version"]:  # without torch
        print(f"pcae-export {__version__}")
        return 0
    try:
        from pcae_export.commands import Export
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("pcae_"):
            raise
        command = install_command("export")
        print(f"pcae-export: {package} is not installed: {command}", file=sys.stderr)
        return 1
    return run(Export, argv)


def main() -> None:
    sys.exit(start(sys.argv[1:]))


if __name__ == "__main__":
    main()
