"""Run a command line described by a pydantic-settings model; one line and an exit code when it fails.

It knows settings models and exit codes, nothing of what a command does.

    exit 0   done            exit 1   it could not be done (PcaeError)
    exit 2   wrong flags     exit 130 interrupted
"""

import sys
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp, SettingsError

from pcae_serve.errors import PcaeError


def run(command: type[BaseModel], argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default sys.argv) into `command`, call its cli_cmd, return the exit code."""
    program = command.model_config.get("cli_prog_name") or "pcae"
    try:
        CliApp.run(command, cli_args=list(sys.argv[1:] if argv is None else argv))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            flag = "--" + "-".join(str(part).replace("_", "-") for part in problem["loc"][-1:])
            message = problem["msg"].removeprefix("Value error, ")
            print(f"{program}: {flag}: {message}", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except PcaeError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
