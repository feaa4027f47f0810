"""Run a command line described by a settings model; on failure print one line and set an exit code.

    exit 0   done            exit 1     failed (PcaeError), or the reader of the output has left
    exit 2   wrong flags     exit 130   interrupted

Without any argument, a command with subcommands prints its usage (exit 2).
"""

import contextlib
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliApp, SettingsConfigDict, SettingsError

from pcae_serve.errors import PcaeError, one_line


def config(program: str) -> SettingsConfigDict:
    """How every command reads its flags; variables are named after it, as PCAE_TRAIN_…."""
    return SettingsConfigDict(
        cli_prog_name=program,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        env_prefix=f"{program.replace('-', '_').upper()}_",
    )


def run(command: type[BaseModel], argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default sys.argv) into `command`, call its cli_cmd, return the exit code.

    If the reader of standard output or standard error leaves, as `head` does, the command ends
    without a message and with exit code 1.
    """
    _open_missing_streams()
    try:
        code = _run(command, argv)
    except BrokenPipeError:
        if not any(map(_reader_left, (sys.stdout, sys.stderr))):
            raise  # another pipe, such as one to a worker process
        code = 1
    return code if _flush() else code or 1


def _run(command: type[BaseModel], argv: Sequence[str] | None) -> int:
    program = command.model_config.get("cli_prog_name") or "pcae"
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        CliApp.run(command, cli_args=arguments, cli_exit_on_error=False)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            print(f"{program}: {_problem(problem)}", file=sys.stderr)
        return 2
    except SettingsError as error:
        if not arguments:
            with contextlib.redirect_stdout(sys.stderr):
                _run(command, ["--help"])
            return 2
        print(f"{program}: {one_line(error).removeprefix('error parsing CLI: ')}", file=sys.stderr)
        return 2
    except PcaeError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # of --help
        return int(stop.code or 0)
    return 0


def _problem(problem: ErrorDetails) -> str:
    """One line on what is wrong with a flag, or with several flags together."""
    message = problem["msg"].removeprefix("Value error, ")
    names = [part for part in problem["loc"] if isinstance(part, str)]
    together = problem["type"] == "value_error" and not isinstance(problem["input"], str | tuple)
    if together or not names:  # a check of the whole model: its message names the flags
        return message
    return f"--{names[-1].replace('_', '-')}: {message}"


def _open_missing_streams() -> None:
    """Open the null device in place of standard streams that were closed before the start.

    Python sets such a stream to None, and its descriptor would go to the next file opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def _reader_left(stream: TextIO) -> bool:
    """Whether the stream is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file, as in tests
        return False
    return bool(poll.poll(0))


def _flush() -> bool:
    """Flush standard output and error; False if the reader of one has left.

    What is still buffered then goes to the null device: otherwise the interpreter would try again
    at exit and print the error.
    """
    whole = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            whole = False
    return whole
