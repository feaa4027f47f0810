"""The files of docker/ without a build; docker/try.sh builds an image and tests it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from compose_spec import PyCompose

from pcae_serve.settings import Settings
from pcae_serve.version import __version__

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = DOCKER / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
TARGETS = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
GUIDE = (ROOT / "docs" / "containers.md").read_text()
# test_deployment has those of Kubernetes and Ray
YAMLS = sorted(
    {*DOCKER.rglob("*.yaml")} - {*DOCKER.glob("kubernetes/**/*")} - {*DOCKER.glob("ray/*")}
)
SERVERS = ("cpu", "gpu", "tensorrt")


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_is_of_the_compose_specification() -> None:
    # its reader supports neither `<<` nor variables
    text = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", COMPOSE.read_text())
    merged = yaml.safe_dump(yaml.safe_load(text))
    assert set(PyCompose.from_yaml(merged).service_names()) == SERVICES.keys()


def test_what_is_no_compose_file_is_noticed() -> None:
    with pytest.raises(Exception, match="prots"):
        PyCompose.from_yaml("services: {cpu: {image: x, prots: []}}")


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.name)
def test_every_mounted_file_is_there_and_every_yaml_is_read(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text()), dict)
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DOCKER / source).is_file()


@pytest.mark.parametrize("name", SERVERS)
def test_servers_are_read_only_and_published_to_this_machine_alone(name: str) -> None:
    service: dict[str, Any] = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert f"AS {service['build']['target']}\n" in DOCKERFILE


def test_documented_commands_name_existing_targets_files_profiles_and_settings() -> None:
    """They are not run: that needs a Docker engine."""
    typed = re.findall(r"^(docker .*(?:\\\n.*)*)", GUIDE, re.MULTILINE)
    assert len(typed) >= 3
    profiles = {name for service in SERVICES.values() for name in service.get("profiles", [])}
    for command in typed:
        assert set(re.findall(r"--target (\S+)", command)) <= TARGETS, command
        assert set(re.findall(r"--profile (\S+)", command)) <= profiles, command
        assert all((ROOT / file).is_file() for file in re.findall(r"-f (\S+)", command)), command
        settings = {name.lower() for name in re.findall(r"PCAE_([A-Z_]+)=", command)}
        assert settings <= Settings.model_fields.keys(), command


def test_the_label_has_the_version() -> None:
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE


def test_gpus_are_reserved_where_they_are_used() -> None:
    for name in ("gpu", "plans", "tensorrt"):
        [device] = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    waits = SERVICES["tensorrt"]["depends_on"]["plans"]["condition"]
    assert waits == "service_completed_successfully"


def test_every_variable_is_a_setting() -> None:
    named = set(re.findall(r"PCAE_(\w+)[=:]", DOCKERFILE + COMPOSE.read_text())) - {"PUBLISH"}
    assert len(named) >= 5
    assert {name.lower() for name in named} <= Settings.model_fields.keys()


def test_the_pins_of_the_images_name_what_constraints_txt_leaves_out() -> None:
    def names(file: Path) -> set[str]:
        lines = [line for line in file.read_text().splitlines() if line[0] != "#"]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
        return {line.split("==")[0].lower().replace("_", "-") for line in lines}

    ours = [DOCKER / "constraints-gpu.txt", DOCKER / "constraints-tensorrt.txt"]
    for file in ours:
        assert not names(file) & names(ROOT / "constraints.txt")
