"""pcae-train: the command line. It imports torch only after it knows that a command needs it."""

import sys
from collections.abc import Sequence

from pydantic_settings import BaseSettings

from pcae_serve.command import run_with_extra


def start(argv: Sequence[str]) -> int:
    """Run the command that `argv` names and return the exit code."""
    return run_with_extra(_load, "pcae-train", "train", argv)


def _load() -> type[BaseSettings]:
    from pcae_training.commands import Train

    return Train


def main() -> None:
    sys.exit(start(sys.argv[1:]))


if __name__ == "__main__":
    main()
