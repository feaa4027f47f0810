"""pcae-serve: the first word chooses a command, and only its modules are imported.

pcae-serve [serve] …     pcae-serve classify FILE…
pcae-serve simulate …    pcae-serve replay URL …
"""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pydantic import create_model
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.command import config, run

#: Commands other than `serve`: module and class, and the description in `pcae-serve --help`.
COMMANDS = {
    "classify": (
        "pcae_serve.commands.classify:Classify",
        "classify images, here or on a running server",
    ),
    "simulate": ("pcae_serve.commands.simulate:Simulate", "compare policies on a virtual clock"),
    "replay": ("pcae_serve.commands.replay:Replay", "send a trace to a running server"),
}
SERVE = {"serve": "serve a bundle over HTTP; the default, with the options below"}


class _Command(BaseSettings):
    model_config = config("pcae-serve")

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def start(argv: Sequence[str]) -> int:
    """Run the command that the first word names, or `serve`, and return the exit code."""
    word = argv[0] if argv else ""
    if word in COMMANDS:
        return run(subcommand(word), argv)
    if word == "--version":  # without loading the server
        return run(_Command, argv)
    # Until the server handles signals: as PID 1 of a container this process would not get SIGTERM,
    # because the kernel drops signals to PID 1 that have no handler.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    from pcae_serve.commands.serve import Serve  # 0.5 s, which the other commands save

    commands = SERVE | {name: about for name, (_, about) in COMMANDS.items()}
    return run(Serve, argv[1:] if word == "serve" else argv, commands=commands)


def subcommand(word: str) -> type[BaseSettings]:
    """Return a command line with this one command; the others are not imported."""
    module, _, name = COMMANDS[word][0].partition(":")
    model: Any = getattr(import_module(module), name)
    fields: dict[str, Any] = {word: (CliSubCommand[model], ...)}  # type: ignore[misc]
    return create_model("Command", __base__=_Command, **fields)


def main() -> None:
    sys.exit(start(sys.argv[1:]))


if __name__ == "__main__":
    main()
