"""Run a command line described by a settings model; one line and an exit code when it fails.

It knows settings models and exit codes, nothing of what a command does.

    exit 0   done            exit 1     it could not be done (PcaeError)
    exit 2   wrong flags     exit 130   interrupted

Without any argument a command of subcommands prints its usage (exit 2).
"""

import contextlib
import sys
from collections.abc import Sequence

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
    """Parse `argv` (default sys.argv) into `command`, call its cli_cmd, return the exit code."""
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
                run(command, ["--help"])
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
