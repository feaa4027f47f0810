"""Command lines described by settings models, shared by pcae-serve, pcae-export and pcae-train.

    exit 0   done            exit 1     failed (PcaeError), or the reader of the output has left
    exit 2   wrong flags     exit 130   interrupted

Errors are printed as one line to standard error. Each program has --help and --version. A model
may add two things to what pydantic-settings reads from its fields:

    flag_groups: ClassVar = {"network": ("host", "port")}     titles in --help and their fields
    bundle: Annotated[Path, Metavar("DIR")]                   the value's name in --help
"""

import contextlib
import difflib
import inspect
import os
import re
import select
import shutil
import sys
import textwrap
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, TextIO, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    CliUnknownArgs,
    SettingsConfigDict,
    SettingsError,
)

from pcae_serve.errors import PcaeError, one_line
from pcae_serve.version import __version__

#: Names of values in --help: by the last word of a field's name, else by its type, else that word.
WORDS = {"ms": "MS", "s": "SECONDS", "mb": "MB", "file": "FILE", "dir": "DIR"}
TYPES = {int: "N", float: "X", Path: "PATH"}

_UNKNOWN_ARGS = get_args(CliUnknownArgs)[2]


@dataclass(frozen=True)
class Metavar:
    """The name of a flag's value in --help, such as DIR in `--bundle DIR`."""

    text: str


@dataclass(frozen=True)
class _Flag:
    """A field of a command's model, as its flag is shown in --help."""

    name: str
    field: FieldInfo
    group: str | None  # title of the section; None: the parser's own

    @property
    def explicit(self) -> str | None:
        """The value's name, if the model gives one."""
        return next((each.text for each in self.field.metadata if isinstance(each, Metavar)), None)

    def metavar(self, types: str) -> str:
        """Return the value's name. `types` is what pydantic-settings shows, such as {a,b}."""
        if self.explicit is not None:
            return self.explicit
        if types.startswith("{"):
            return types
        word = self.name.strip("_").rpartition("_")[2]
        if word != self.name and word in WORDS:
            return WORDS[word]
        return TYPES.get(_value_type(self.field.annotation)) or word.upper()

    def help(self, positional: bool) -> str:
        """Return the description, followed by the default as one would type it."""
        text = self.field.description or ""
        if self.field.is_required():
            return text if positional else f"{text} (required)".strip()
        default = self.field.get_default(call_default_factory=True)
        if default is True:
            shown = "on"
        elif isinstance(default, list | tuple):
            shown = " ".join(map(str, default))
        else:
            shown = "" if default is None or default is False else str(default)
        return f"{text} (default: {shown})".strip() if shown else text


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


def _run(
    command: type[BaseSettings], argv: Sequence[str] | None, commands: Mapping[str, str]
) -> int:
    program = command.model_config.get("cli_prog_name") or "pcae"
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(command, program, commands)
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
        message += did_you_mean(wrong[1], parser.options, "--") if wrong else ""
        print(f"{program}: {message}", file=sys.stderr)
        return 2
    except PcaeError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # of --help and --version, or of a command with its own exit code
        return int(stop.code or 0)
    return 0


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean budget_ms?" with the nearest known name, or "" if none is near.

    `prefix` is what all names share; it does not count as similarity.
    """
    rest = [each.removeprefix(prefix) for each in known]
    near = difflib.get_close_matches(name.removeprefix(prefix), rest, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


# --- what is wrong


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


# --- help


class _Parser:
    """The parser of a program and its subcommands, with help texts made from their models."""

    def __init__(
        self, command: type[BaseSettings], program: str, commands: Mapping[str, str]
    ) -> None:
        self._program = program
        self._flags = dict(_flags(command))
        self._groups: dict[tuple[Any, str], Any] = {}
        self._usage: dict[Any, list[str]] = {}  # of each parser: its positional arguments
        self._commands = dict(commands)
        self.options: list[str] = []
        self.source = CliSettingsSource[ArgumentParser](
            command,
            cli_exit_on_error=False,
            add_argument_method=self._add_argument,
            add_parser_method=self._add_parser,
            add_subparsers_method=self._add_subparsers,
            formatter_class=partial(RawDescriptionHelpFormatter, max_help_position=30),
        )
        for dest, flag in self._flags.items():
            if _UNKNOWN_ARGS in flag.field.metadata:
                self._add_rest(dest, flag)
        for parser, words in self._usage.items():
            parser.usage = " ".join(["%(prog)s", *words])
            parser.description = _wrapped(parser.description or "")
        self.has_commands = len(self._commands) > len(commands)
        if self._commands:
            root = self.source.root_parser
            root.description = f"{root.description}\n\n{_listed(self._commands)}"

    def _add_argument(self, parser: Any, *names: str, **options: Any) -> Any:
        usage = self._usage.setdefault(parser, ["[options]"])
        flag = self._flags.get(options.get("dest", names[0]))
        if flag is not None and options.get("help") != SUPPRESS:
            positional = "dest" not in options
            options["help"] = flag.help(positional).replace("%", "%%")
            if "metavar" in options:
                options["metavar"] = flag.metavar(options["metavar"])
            if positional:
                many = options.get("nargs") in ("*", "+") and not flag.explicit
                usage.append(options["metavar"] + "..." * many)
            if flag.group is not None:
                key = (parser, flag.group)
                if key not in self._groups:
                    self._groups[key] = parser.add_argument_group(flag.group)
                parser = self._groups[key]
        self.options += names
        added = parser.add_argument(*names, **options)
        if options.get("action") == "help":  # of the whole program
            parser.add_argument(
                "--version",
                action="version",
                version=f"{self._program} {__version__}",
                help="show the version and exit",
            )
        return added

    def _add_subparsers(self, parser: Any, **options: Any) -> Any:
        self._usage[parser] = ["COMMAND", "..."]
        return parser.add_subparsers(**options | {"help": SUPPRESS})  # listed in the description

    def _add_parser(self, subparsers: Any, name: str, **options: Any) -> Any:
        about = inspect.cleandoc(options["description"] or "").partition("\n\n")[0]
        about = " ".join(about.split()).partition(". ")[0].rstrip(".")
        self._commands[name] = about[:1].lower() + about[1:]
        parser = subparsers.add_parser(name, **options)
        self._usage[parser] = ["[options]"]
        return parser

    def _add_rest(self, dest: str, flag: "_Flag") -> None:
        """Show an argument that argparse does not know: it takes what is left, as file names."""
        program = " ".join([self._program, *dest.split(".")[:-1]])
        for parser, words in self._usage.items():
            if parser.prog == program:
                words.append(f"{flag.metavar('')}...")
                text = f"{flag.metavar('')}  {flag.field.description}"
                parser.add_argument_group("arguments", text)


def _flags(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, _Flag]]:
    """Yield each field of a model and of its subcommands, by the parser's name for it."""
    groups: Mapping[str, Iterable[str]] = getattr(model, "flag_groups", {})
    titles = {name: title for title, names in groups.items() for name in names}
    for name, field in model.model_fields.items():
        dest = f"{prefix}{field.alias or name}"
        yield dest, _Flag(name, field, titles.get(name))
        for each in get_args(field.annotation):
            if isinstance(each, type) and issubclass(each, BaseModel):
                yield from _flags(each, f"{dest}.")


def _listed(commands: Mapping[str, str]) -> str:
    """Return the lines of --help on a program's commands, by name and description."""
    column = max(map(len, commands)) + 4
    width = shutil.get_terminal_size().columns - 2
    lines = ["commands (each has its own --help):"]
    for name, about in commands.items():
        first = f"  {name:<{column - 2}}"
        lines.append(
            textwrap.fill(about, width, initial_indent=first, subsequent_indent=" " * column)
        )
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    """Wrap the paragraphs of a docstring at the width of the terminal."""
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(textwrap.fill(each, width) for each in inspect.cleandoc(text).split("\n\n"))


def _value_type(annotation: Any) -> Any:
    """Return the type of one value: int for int | None, Path for list[Path]."""
    if get_origin(annotation) in (None, Literal):
        return annotation
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _value_type(inner[0])
    return _value_type(next(each for each in inner if each is not NoneType))


# --- standard streams


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
