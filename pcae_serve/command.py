"""Run a command line described by a settings model; on failure print one line and set an exit code.

    exit 0   done            exit 1     failed (PcaeError), or the reader of the output has left
    exit 2   wrong flags     exit 130   interrupted

Used by pcae-serve, pcae-export and pcae-train.
"""

import contextlib
import os
import re
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TextIO

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from pcae_serve.errors import PcaeError, one_line
from pcae_serve.flags import Parser, did_you_mean
from pcae_serve.version import __version__, install_command


def config(program: str) -> SettingsConfigDict:
    """Return the settings of a program's root model; its variables start with PCAE_SERVE_ etc."""
    return SettingsConfigDict(
        cli_prog_name=program,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        env_prefix=f"{program.replace('-', '_').upper()}_",
    )


def run(
    command: type[BaseSettings],
    argv: Sequence[str] | None = None,
    *,
    commands: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Parse `argv` (default sys.argv) into `command`, call its cli_cmd and return the exit code.

    `commands` are listed by --help, by name and description, in addition to the subcommands of the
    model. Without any argument, a program of subcommands prints its help and returns 2. If the
    reader of standard output or standard error leaves, as `head` does, the command ends without a
    message and with exit code 1.
    """
    _open_missing_streams()
    try:
        code = _run(command, argv, commands)
    except BrokenPipeError:
        if not any(map(_reader_left, (sys.stdout, sys.stderr))):
            raise  # another pipe, such as one to a worker process
        code = 1
    return code if _flush() else code or 1


def run_with_extra(
    load: Callable[[], type[BaseSettings]], program: str, extra: str, argv: Sequence[str]
) -> int:
    """Import a command by `load` and `run` it; if a package is missing, print what to install.

    extra: that has all packages of the program. --version works without them.
    """
    if list(argv) == ["--version"]:
        print(f"{program} {__version__}")
        return 0
    try:
        command = load()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package.startswith("pcae_"):
            raise
        print(f"{program}: {package} is not installed: {install_command(extra)}", file=sys.stderr)
        return 1
    return run(command, argv)


def _run(
    command: type[BaseSettings], argv: Sequence[str] | None, commands: Mapping[str, str]
) -> int:
    program = command.model_config.get("cli_prog_name") or "pcae"
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(command, program, commands)
    try:
        CliApp.run(command, cli_args=arguments, cli_settings_source=parser.source)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            print(f"{program}: {_problem(problem, command, arguments)}", file=sys.stderr)
        return 2
    except SettingsError as error:
        if not arguments and parser.has_commands:
            with contextlib.redirect_stdout(sys.stderr):
                _run(command, ["--help"], commands)
            return 2
        message = one_line(error).removeprefix("error parsing CLI: ")
        wrong = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if wrong and wrong[1] in parser.options:
            message += f"; this command does not take {wrong[1]}, another one does: see --help"
        elif wrong:
            message += did_you_mean(wrong[1], parser.options, "--")
        elif word := re.match(r"unrecognized arguments: (\w\S*)", message):
            message += did_you_mean(word[1], parser.commands)
        if choice := re.match(r"argument (\{.*\}): invalid choice: '([^']*)'", message):
            names = choice[1].strip("{}").split(",")
            message = f"unknown command {choice[2]!r}{did_you_mean(choice[2], names)}"
            message += "" if "?" in message else f"; use one of {', '.join(names)}"
        print(f"{program}: {message}", file=sys.stderr)
        return 2
    except PcaeError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # of --help and --version, or of a command with its own exit code
        left = _reader_left(sys.stdout)  # argparse ignores it if a long --help cannot be written
        return int(stop.code or left)
    return 0


def _problem(problem: ErrorDetails, command: type[BaseModel], arguments: Sequence[str]) -> str:
    """Return one line on what is wrong with a flag, or with several flags together."""
    message = problem["msg"].removeprefix("Value error, ")
    names = [part for part in problem["loc"] if isinstance(part, str)]
    together = problem["type"] == "value_error" and not isinstance(problem["input"], str | tuple)
    if together or not names:  # a check of the whole model: its message names the flags
        return message
    return f"{_origin(names, command, arguments)}: {message}"


def _origin(names: Sequence[str], command: type[BaseModel], arguments: Sequence[str]) -> str:
    """Return where a field's value comes from: its flag, its variable or a config file's key."""
    name = names[-1]
    flag = f"--{name.strip('_').replace('_', '-')}"
    if len(names) > 1 or any(each.partition("=")[0] == flag for each in arguments):
        return flag
    variable = f"{command.model_config.get('env_prefix', '')}{name}".upper()
    if variable in map(str.upper, os.environ):
        return variable
    config_key = getattr(command, "config_key", None)
    return (config_key(name) if config_key else None) or flag


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
    complete = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            complete = False
    return complete
