import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from pcae_serve.command import run
from pcae_serve.scheduling.policies.registry import NAMES
from pcae_serve.settings import Settings, unknown_variables


def test_the_environment_wins_over_the_file_and_arguments_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pcae.toml"
    config.write_text("port = 1111\nbudget_ms = 111.0\nmax_batch = 11\n")
    monkeypatch.setenv("PCAE_CONFIG", str(config))
    monkeypatch.setenv("PCAE_PORT", "2222")
    monkeypatch.setenv("PCAE_BUDGET_MS", "222")
    settings = Settings(port=3333)
    assert (settings.port, settings.budget_ms, settings.max_batch) == (3333, 222.0, 11)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "port = ",
        "port 8000",
        "port = " + "[" * 10_000,
        "#" * 1_100_000,
        "port = 9" + "0" * 5000,
    ],
    ids=["missing", "no value", "no sign", "deep", "large", "digits"],
)
def test_a_config_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    config = tmp_path / "pcae.toml"
    if text is not None:
        config.write_text(text)
    monkeypatch.setenv("PCAE_CONFIG", str(config))
    with pytest.raises(SettingsError, match=r"pcae\.toml"):
        Settings()


def test_a_config_file_that_is_a_fifo_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pcae.toml")
    monkeypatch.setenv("PCAE_CONFIG", str(tmp_path / "pcae.toml"))
    with pytest.raises(SettingsError, match="a FIFO, not a regular file"):
        Settings()


@pytest.mark.parametrize(
    "change",
    [
        {"port": 70000},
        {"budget_ms": 0},
        {"budget_ms": float("nan")},
        {"max_batch": 0},
        {"device": "gpu"},
        {"device": "cuda"},
        {"device": "cuda:first"},
        {"backend": "torch"},
        {"device": "cpu,cuda:0"},
        {"device": "cuda:0,"},
        {"device": "cuda:0,auto"},
        {"root_path": "vision"},
        {"root_path": "//host"},
        {"root_path": "/a b"},
        {"trusted_proxies": "proxy.local"},
        {"trusted_proxies": "127.0.0.1,"},
    ],
)
def test_senseless_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**change)


def test_a_root_path_needs_no_trailing_slash() -> None:
    assert Settings(root_path="/vision/").root_path == "/vision"


def test_several_devices_are_named_once_each() -> None:
    assert Settings().devices == ("auto",)
    assert Settings(device="cuda:1,cuda:0").devices == ("cuda:1", "cuda:0")
    with pytest.raises(ValidationError, match="cuda:1 is named twice"):
        Settings(device="cuda:1,cuda:0,cuda:01")


def test_every_setting_is_described_in_one_group() -> None:
    grouped = [name for names in Settings.flag_groups.values() for name in names]
    assert sorted(grouped) == sorted(Settings.model_fields)
    assert all(field.description for field in Settings.model_fields.values())
    policy = Settings.model_fields["policy"].description or ""
    assert all(name in policy for name in (*NAMES, "fixed:TIER", "+drop"))


def test_an_unknown_key_in_the_file_is_an_error_with_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pcae.toml"
    config.write_text("bugdet_ms = 5\n")
    monkeypatch.setenv("PCAE_CONFIG", str(config))
    message = f"{config}: unknown key 'bugdet_ms'; did you mean budget_ms?"
    with pytest.raises(SettingsError, match=re.escape(message)):
        Settings()


def test_a_wrong_value_is_reported_with_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reported(*flags: str) -> str:
        assert run(Settings, flags) == 2
        return capsys.readouterr().err

    config = tmp_path / "pcae.toml"
    config.write_text('port = "x"\n')
    monkeypatch.setenv("PCAE_CONFIG", str(config))
    assert reported().startswith(f"pcae-serve: {config}: port: Input should be a valid integer")
    monkeypatch.setenv("PCAE_PORT", "y")
    assert reported().startswith("pcae-serve: PCAE_PORT: Input should be a valid integer")
    assert reported("--port=z").startswith("pcae-serve: --port: Input should be a valid integer")


def test_unknown_variables_are_reported_with_the_nearest_name() -> None:
    known = ["PCAE_BUDGET_MS", "pcae_port", "PCAE_CONFIG", "PCAE_API_KEY", "PCAE_SERVE_PORT"]
    known += ["PCAE_TRAIN_FINETUNE", "PCAE_EXPORT_BUNDLE", "HOME"]
    assert unknown_variables(dict.fromkeys(known, "1")) == []
    assert unknown_variables({"PCAE_BUDGT_MS": "5", "PCAE_QZ": "1"}) == [
        "PCAE_BUDGT_MS is set, but it is not a setting; did you mean PCAE_BUDGET_MS?",
        "PCAE_QZ is set, but it is not a setting",
    ]
