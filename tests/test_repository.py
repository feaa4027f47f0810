"""Files that services of the hosting site read: they parse, and name what exists."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
FILES = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_is_yaml(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_ci_runs_on_every_supported_python() -> None:
    job = load(".github/workflows/ci.yml")["jobs"]["run"]
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert job["strategy"]["matrix"]["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert ".ci/run" in [step.get("run") for step in job["steps"]]


def test_pictures_of_the_browser_tests_are_kept_whatever_their_outcome() -> None:
    steps = load(".github/workflows/ci.yml")["jobs"]["run"]["steps"]
    [(i, kept)] = [
        (i, step) for i, step in enumerate(steps) if "upload-artifact" in step.get("uses", "")
    ]
    assert steps[i - 1]["run"] == ".ci/run"
    assert kept["if"] == "always()"
    folder = kept["with"]["path"].rstrip("/")
    assert f'Path("{folder}")' in (ROOT / "tests" / "browser" / "conftest.py").read_text()
    assert f"/{folder}/" in (ROOT / ".gitignore").read_text()


@pytest.mark.parametrize("workflow", ["ci", "release"])
def test_workflows_call_what_exists(workflow: str) -> None:
    jobs = load(f".github/workflows/{workflow}.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for command in commands:
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= TARGETS, command
        for path in re.findall(r"(?:\.ci|docker|tests)/[\w./]+", command):
            assert (ROOT / path).is_file(), path


def test_hooks_run_tools_of_the_test_environment() -> None:
    requirements = " ".join(PROJECT["optional-dependencies"]["dev"])
    for repository in load(".pre-commit-config.yaml")["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            tool, *arguments = hook["entry"].split()
            assert tool.startswith(".venv-test/bin/")
            name = Path(tool).name
            assert name in requirements or (ROOT / arguments[0]).is_file(), name
