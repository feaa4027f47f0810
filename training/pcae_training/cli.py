"""pcae-train: the command line. It imports torch only after it knows that a command needs it."""

import sys
from collections.abc import Sequence

from pcae_serve.command import run
from pcae_serve.version import __version__, install_command


def start(argv: Sequence[str]) -> int:
    """Run the command that `argv` names and return the exit code."""
    if list(argv) == ["--version"]:
        print(f"pcae-train {__version__}")
        return 0
    try:
        from pcae_training.commands import Train
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pcae_"):
            raise
        message = f"{error.name} is not installed: {install_command('train')}"
        print(f"pcae-train: {message}", file=sys.stderr)
        return 1
    return run(Train, argv)


def main() -> None:
    sys.exit(start(sys.argv[1:]))


if __name__ == "__main__":
    main()
