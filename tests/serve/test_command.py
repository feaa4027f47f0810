"""The command line that the three programs share, on a small program of its own."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BaseModel, Field, model_validator
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.command import config, run
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.version import __version__


class Bake(BaseModel):
    """Bake a loaf. It takes time.

    Rye is not supported.
    """

    flag_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "loaf": ("shape", "rest_s"),
        "oven": ("oven_heat", "fan"),
    }

    oven_heat: float = Field(gt=0, description="heat at 100 %")
    hours: tuple[int, ...] = (1,)
    fan: bool = True
    rest_s: float = Field(5, description="pause before slicing")
    rack: str = Field(
        "low", description="any, but for bread the lowest that the --oven-heat allows"
    )
    shape: Literal["round", "long"] | None = None
    recipe: Annotated[Path | None, Metavar("CARD")] = None
    log_file: Path | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Bake":
        if self.oven_heat * sum(self.hours) > 1000:
            raise ValueError("--oven-heat and --hours together burn it")
        return self

    def cli_cmd(self) -> None:
        if self.oven_heat == 13:
            raise PcaeError("the oven is broken")
        if self.oven_heat == 14:
            raise KeyboardInterrupt
        print("baked")


class Kitchen(BaseSettings):
    """Cook."""

    model_config = config("kitchen")
    bake: CliSubCommand[Bake]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("bake --oven-heat 200", 0, ""),
        ("bake", 2, "kitchen: --oven-heat: Field required"),
        ("bake --oven-heat -1", 2, "kitchen: --oven-heat: Input should be greater than 0"),
        ("bake --oven-heat 1 --hours [1,x]", 2, "kitchen: --hours: "),
        ("bake --oven-heat 900 --hours [2]", 2, "kitchen: --oven-heat and --hours together"),
        ("bake --oven-heat", 2, "kitchen: argument --oven-heat: expected one argument"),
        ("bake --oven-heat 1 --salt 2", 2, "kitchen: unrecognized arguments: --salt 2"),
        (
            "bake --oven 1",
            2,
            "kitchen: unrecognized arguments: --oven 1; did you mean --oven-heat?",
        ),
        ("fry", 2, "kitchen: unknown command 'fry'; use one of bake"),
        ("bakes", 2, "kitchen: unknown command 'bakes'; did you mean bake?"),
        ("bake --oven-heat 13", 1, "kitchen: the oven is broken"),
        ("bake --oven-heat 14", 130, ""),
    ],
)
def test_one_line_and_an_exit_code(
    line: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Kitchen, line.split()) == code
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == bool(message)
    assert not message or errors[0].startswith(message)


class Wash(BaseModel):
    """Wash."""

    soap: float = Field(1)


class Dry(BaseModel):
    """Dry."""

    hot: bool = False


class Laundry(BaseSettings):
    """Wash and dry."""

    model_config = config("laundry")
    wash: CliSubCommand[Wash]
    dry: CliSubCommand[Dry]


def test_a_flag_of_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Laundry, ["dry", "--soap", "2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "laundry: unrecognized arguments: --soap 2; this command does not take --soap, another one"
        " does: see --help"
    ]


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Kitchen, []) == 2
    assert capsys.readouterr().err.startswith("usage: kitchen")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Kitchen, ["--version"]) == 0
    assert capsys.readouterr().out == f"kitchen {__version__}\n"


def test_help_lists_the_commands_with_their_descriptions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(Kitchen, ["--help"], commands={"clean": "clean up"}) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: kitchen COMMAND ...")
    assert "  clean  clean up\n  bake   bake a loaf\n" in shown


def test_help_groups_flags_and_names_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Kitchen, ["bake", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: kitchen bake [options]\n")
    assert "Rye is not supported." in shown
    options, loaf = shown.split("\nloaf:\n")
    loaf, oven = loaf.split("\noven:\n")  # in the order of flag_groups, not of the fields
    assert "--oven-heat X" in oven
    assert "heat at 100 % (required)" in oven
    assert re.search(r"--fan, --no-fan +\(default: on\)", oven)
    for line in (
        "--hours N (default: 1)",
        "--recipe CARD",
        "--log-file FILE",
    ):
        assert line in re.sub(r"\s+", " ", options), line
    assert re.search(r"--rest-s SECONDS +pause before slicing \(default: 5\)", loaf)
    assert "--shape {round,long}" in loaf
    assert "null" not in shown


def test_help_breaks_no_name_at_its_hyphens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in range(60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run(Kitchen, ["bake", "--help"]) == 0
        assert "the --oven-heat allows" in re.sub(r"\s+", " ", capsys.readouterr().out)
