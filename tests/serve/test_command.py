import pytest
from pydantic import BaseModel, Field, model_validator
from pydantic_settings import BaseSettings, CliApp, CliSubCommand, SettingsConfigDict

from pcae_serve.command import run
from pcae_serve.errors import PcaeError


class Bake(BaseModel):
    """Bake a loaf."""

    oven_heat: float = Field(gt=0)
    hours: tuple[int, ...] = (1,)

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

    model_config = SettingsConfigDict(cli_prog_name="kitchen", cli_kebab_case=True)
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
        ("fry", 2, "kitchen: argument {bake}: invalid choice"),
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


def test_nothing_at_all_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Kitchen, []) == 2
    assert capsys.readouterr().err.startswith("usage: kitchen")


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Kitchen, ["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: kitchen")
