"""The commands and flags of the three programs as Markdown, from the parsers that print --help."""

from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterator
from typing import Any

from pydantic_settings import BaseSettings

from pcae_export.commands import Export
from pcae_serve import cli
from pcae_serve.flags import Parser
from pcae_training.commands import Train


def command_reference() -> str:
    """Return one section per program, with one part per subcommand."""
    lines = [f"## pcae-serve\n\n`pcae-serve [serve] [options]`: {_sentence(cli.SERVE['serve'])}"]
    lines += ["Its flags are the settings of the server: [configuration.md](configuration.md).\n"]
    for word in cli.COMMANDS:
        lines += _commands(cli.subcommand(word), "pcae-serve")
    for model, program in ((Export, "pcae-export"), (Train, "pcae-train")):
        parser = _parser(model, program)
        lines += [f"## {program}\n", f"{_paragraphs(parser.description)[0]}\n"]
        lines += _commands(model, program)
    return "\n".join(lines)


def _commands(model: type[BaseSettings], program: str) -> Iterator[str]:
    """Yield the lines on each subcommand of a model."""
    for action in _parser(model, program)._actions:
        for name, parser in _parsers(action).items():
            usage = (parser.usage or "").replace("%(prog)s", f"{program} {name}")
            yield from (f"### {program} {name}\n", f"`{usage}`\n")
            yield from (f"{each}\n" for each in _paragraphs(parser.description))
            yield from _tables(parser)


def _parser(model: type[BaseSettings], program: str) -> ArgumentParser:
    return Parser(model, program, {}).source.root_parser


def _parsers(action: Action) -> dict[str, ArgumentParser]:
    """Return the parsers of an action that chooses a subcommand, by its name."""
    return action.choices if isinstance(action.choices, dict) else {}


def _tables(parser: ArgumentParser) -> Iterator[str]:
    """Yield a table per group of arguments, --help left out."""
    for group in parser._action_groups:
        rows = [
            f"| {_invocation(action)} | {_cell(action)} |"
            for action in group._group_actions
            if action.help != SUPPRESS and "--help" not in action.option_strings
        ]
        if rows:
            title = group.title or ""
            yield from (f"| {title} | meaning |", "| --- | --- |", *rows, "")
        elif group.description and group.title == "positional arguments":  # takes file names
            name, _, text = group.description.partition("  ")
            yield from (f"| {group.title} | meaning |", "| --- | --- |")
            yield from (f"| `{name}` | {text} |", "")


def _invocation(action: Action) -> str:
    """Return an argument as one types it, such as `--port N` or `--log, --no-log`."""
    names: Any = action.option_strings or [action.metavar or action.dest]
    if getattr(action, "is_off", False):
        names = names[:1]
    shown = ", ".join(names)
    if action.option_strings and action.nargs != 0 and action.metavar:
        shown += f" {action.metavar}"
    return f"`{shown.replace('|', chr(92) + '|')}`"


def _cell(action: Action) -> str:
    """Return the help of an argument for one cell of a table."""
    text = " ".join((action.help or "").replace("%%", "%").split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _paragraphs(description: str | None) -> list[str]:
    """Return paragraphs without line breaks; the list of commands is left out."""
    parts = [" ".join(each.split()) for each in (description or "").split("\n\n")]
    return [each for each in parts if each and not each.startswith("commands (")]


def _sentence(text: str) -> str:
    return f"{text.partition(';')[0]}."
