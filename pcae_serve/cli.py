"""pcae-serve: the first word chooses a command, and only what that one needs is loaded.

pcae-serve [serve] …     pcae-serve classify FILE…
pcae-serve simulate …    pcae-serve replay URL …

It knows commands by name; each stands in a module of its own.
"""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pydantic import create_model
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.command import config, run

#: What pcae-serve does besides serving: where each command stands.
COMMANDS = {
    "classify": ("pcae_serve.commands.classify", "Classify"),
    "simulate": ("pcae_serve.commands.simulate", "Simulate"),
    "replay": ("pcae_serve.commands.replay", "Replay"),
}


class _Command(BaseSettings):
    model_config = config("pcae-serve")

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def start(argv: Sequence[str]) -> int:
    """Run the command that the first word names, and serve where it names none."""
    word = argv[0] if argv else ""
    if word in COMMANDS:
        return run(_command(word), argv)
    # Until the server takes signals: a container's first process would not hear SIGTERM, for the
    # kernel drops what PID 1 has no handler for.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    from pcae_serve.commands.serve import Serve  # half a second that the others need not wait for

    return run(Serve, argv[1:] if word == "serve" else argv)


def _command(word: str) -> type[BaseSettings]:
    """A command line with one command: the others are not loaded for it."""
    module, name = COMMANDS[word]
    model: Any = getattr(import_module(module), name)
    fields: dict[str, Any] = {word: (CliSubCommand[model], ...)}  # type: ignore[misc]
    return create_model("Command", __base__=_Command, **fields)


def main() -> None:
    sys.exit(start(sys.argv[1:]))


if __name__ == "__main__":
    main()
