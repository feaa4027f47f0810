"""The flags of a settings model as a command-line parser, with their --help.

pydantic-settings makes the parser; this module adds --version, lists commands with descriptions,
shows defaults as one would type them, and names values by unit (MS) instead of type (float). A
model can add two things:

    flag_groups: ClassVar = {"network": ("host", "port")}     titles in --help and their fields
    bundle: Annotated[Path, Metavar("DIR")]                   the name of the value in --help
"""

import difflib
import inspect
import shutil
import textwrap
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, CliUnknownArgs

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
    group: str | None  # title of its section in --help; None: the parser's own
    groups: tuple[str, ...]  # all titles of its model, in their order

    @property
    def off(self) -> bool:
        """Whether this is a switch that is off by default."""
        return self.field.get_default(call_default_factory=True) is False

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
            words = any(isinstance(each, str) for each in default)  # long ones need line breaks
            shown = (" " if words else ",").join(map(str, default))
        else:
            shown = "" if default is None or default is False else str(default)
        return f"{text} (default: {shown})".strip() if shown else text


class _HelpFormatter(RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap a help text, but not inside names such as --api-keys-file."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: Action) -> str:
        """Show a switch that is off by default as --json, without its --no-json."""
        if getattr(action, "is_off", False):
            return action.option_strings[0]
        return super()._format_action_invocation(action)


class Parser:
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
            formatter_class=partial(_HelpFormatter, max_help_position=30),
        )
        for dest, flag in self._flags.items():
            if _UNKNOWN_ARGS in flag.field.metadata:
                self._add_rest(dest, flag)
        for parser, words in self._usage.items():
            parser.usage = " ".join(["%(prog)s", *words])
            parser.description = _wrapped(parser.description or "")
        self.has_commands = len(self._commands) > len(commands)
        self.commands = tuple(self._commands)
        if self._commands:
            root = self.source.root_parser
            if not self.has_commands:  # one of `commands` is the default
                root.usage = "%(prog)s [COMMAND] [options]"
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
                for title in flag.groups:  # all at once: they are shown as they were added
                    if (parser, title) not in self._groups:
                        self._groups[parser, title] = parser.add_argument_group(title)
                parser = self._groups[parser, flag.group]
        self.options += names
        added = parser.add_argument(*names, **options)
        added.is_off = flag is not None and flag.off
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
                group = parser.add_argument_group("positional arguments", text)
                # in the place of argparse's own section of that name, which is empty
                parser._action_groups.remove(group)
                parser._action_groups.insert(0, group)


def _flags(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, _Flag]]:
    """Yield each field of a model and of its subcommands, by the parser's name for it."""
    groups: Mapping[str, Iterable[str]] = getattr(model, "flag_groups", {})
    titles = {name: title for title, names in groups.items() for name in names}
    for name, field in model.model_fields.items():
        dest = f"{prefix}{field.alias or name}"
        yield dest, _Flag(name, field, titles.get(name), tuple(groups))
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
            textwrap.fill(
                about,
                width,
                initial_indent=first,
                subsequent_indent=" " * column,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    """Wrap the paragraphs of a docstring at the width of the terminal."""
    width = shutil.get_terminal_size().columns - 2
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(textwrap.fill(each, width, break_on_hyphens=False) for each in paragraphs)


def _value_type(annotation: Any) -> Any:
    """Return the type of one value: int for int | None, Path for list[Path]."""
    if get_origin(annotation) in (None, Literal):
        return annotation
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _value_type(inner[0])
    return _value_type(next(each for each in inner if each is not NoneType))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean budget_ms?" with the nearest known name, or "" if none is near.

    `prefix` is what all names share; it does not count as similarity.
    """
    rest = [each.removeprefix(prefix) for each in known]
    near = difflib.get_close_matches(name.removeprefix(prefix), rest, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
