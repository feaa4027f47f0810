"""The Makefile as a new user meets it. Python and pip are fakes, except in the slow test."""

import os
import re
import shutil
import signal
import stat
import subprocess
import tomllib
from pathlib import Path

import httpx2
import pytest

from tests.support.server_process import ready

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "make", "which", "awk", "rm", "touch", "mkdir", "cat", "chmod")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(folder: Path, *args: str, path: Path | str) -> subprocess.CompletedProcess[str]:
    """Run make in a folder, without variables of a make that may have started this test."""
    make = shutil.which("make")
    assert make, "make is missing: apt-get install make"
    environment = {"PATH": str(path), "HOME": str(folder / "home")}
    return subprocess.run(
        [make, *args], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what make reads, and a space in its name."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with the tools that the Makefile calls, and no python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    return folder


def script(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def fake_python(file: Path, minor: int = 11, venv: bool = True, pip: str = "exit 0") -> None:
    """Write a python 3.`minor` that can be copied into an environment; `pip` is a shell command."""
    answers = f"""
case "$*" in
  *"sys.version_info <"*) exit {int(minor < 11)} ;;
  *"import ensurepip"*) exit {int(not venv)} ;;
  *"-venv"*) echo python3.{minor}-venv ;;
  "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cat "$0" > "$4/bin/python"
    echo 'echo served "$@"' > "$4/bin/pcae-serve"; chmod +x "$4/bin/python" "$4/bin/pcae-serve" ;;
  "-m pip install "*) {pip} ;;
  *) echo "$0 $*" ;;
esac"""
    script(file, answers)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        (None, "python3 is missing: apt-get install python3-venv"),
        ((12, False), "python3.12-venv is missing: apt-get install python3.12-venv"),
        ((10, True), "Python 3.11 or newer is missing: apt-get install python3.11-venv"),
    ],
)
@pytest.mark.parametrize("target", ["serve", "test"])
def test_what_is_missing_is_one_line(
    checkout: Path, path: Path, python: tuple[int, bool] | None, message: str, target: str
) -> None:
    if python is not None:
        fake_python(path / "python3", *python)
    done = run(checkout, target, path=path)
    assert done.returncode == 2
    [line] = (done.stdout + done.stderr).strip().splitlines()
    assert message in line
    assert not list(checkout.glob(".venv*"))


def test_a_named_python_that_is_too_old(checkout: Path, path: Path) -> None:
    fake_python(path / "python3.9", 9)
    fake_python(path / "python3", 12)
    done = run(checkout, "serve", "PYTHON=python3.9", path=path)
    assert "PYTHON=python3.9 is not Python 3.11 or newer" in done.stderr


def test_the_newest_python_that_works_is_chosen(checkout: Path, path: Path) -> None:
    def chosen(*args: str) -> str:
        done = run(checkout, "-n", "serve", *args, path=path)
        match = re.search(r'"(.+)" -m venv', done.stdout)
        assert match, done.stdout + done.stderr
        return Path(match[1]).name

    script(path / "python3.13", "echo 'pyenv: command not found' >&2; exit 127")
    fake_python(path / "python3.12", 12, venv=False)
    fake_python(path / "python3.11", 11)
    fake_python(path / "python3", 14)
    assert chosen() == "python3.11"
    assert chosen("PYTHON=python3") == "python3"


def test_serve_installs_once_then_serves(checkout: Path, path: Path) -> None:
    fake_python(path / "python3", pip='echo "installing $PIP_CONSTRAINT" "$@"')
    first = run(checkout, "serve", "ARGS=--port 9000", path=path)
    assert first.returncode == 0, first.stderr
    assert "installing constraints.txt" in first.stdout
    assert "--editable .[cpu,client]" in first.stdout
    assert first.stdout.endswith("served --port 9000\n")

    assert run(checkout, "serve", path=path).stdout == "served\n"

    newer = (checkout / ".venv" / "installed").stat().st_mtime + 10
    os.utime(checkout / "pyproject.toml", (newer, newer))
    again = run(checkout, "serve", path=path)
    assert "installing" in again.stdout
    assert "-m venv" not in again.stdout  # the environment is kept


def test_a_failed_install_is_repeated_from_an_empty_environment(checkout: Path, path: Path) -> None:
    fake_python(path / "python3", pip="exit 1")
    for _ in range(2):
        done = run(checkout, "serve", path=path)
        assert done.returncode == 2
        assert "served" not in done.stdout
        assert "-m venv --clear .venv" in done.stdout
    fake_python(path / "python3")
    assert run(checkout, "serve", path=path).stdout.endswith("served\n")


def test_make_alone_lists_every_target(checkout: Path, path: Path) -> None:
    done = run(checkout, path=path)
    targets = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[1] for line in done.stdout.splitlines()] == targets


def test_ci_fails_if_make_fails(checkout: Path, path: Path) -> None:
    shutil.copytree(ROOT / ".ci", checkout / ".ci")
    for tool in ("bash", "env", "dirname"):
        (path / tool).symlink_to(shutil.which(tool) or "")
    done = subprocess.run(
        [checkout / ".ci" / "run"], env={"PATH": str(path)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "python3 is missing" in done.stderr


def test_every_requirement_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no addresses, no +cpu
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert f"TORCH := {pins['torch']}\n" in (ROOT / "Makefile").read_text()
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in ("cpu", "client", "train", "export", "dev"):
        wanted += extras[extra]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in wanted} - {"pcae-serve"}
    assert names <= pins.keys()


@pytest.mark.slow
def test_a_real_install_serves_without_torch(tmp_path: Path) -> None:
    """Needs a package index."""
    folder = tmp_path / "fresh clone"
    ignored = shutil.ignore_patterns(".git", ".*cache", ".venv*", "runs")
    shutil.copytree(ROOT, folder, ignore=ignored)
    done = run(folder, "serve", "ARGS=--version", path=os.environ["PATH"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "pcae-serve " in done.stdout

    python = folder / ".venv" / "bin" / "python"
    listed = subprocess.check_output([python, "-m", "pip", "list", "--format=freeze"], text=True)
    installed = dict(line.lower().replace("_", "-").split("==") for line in listed.split())
    pins = (folder / "constraints.txt").read_text().lower().replace("_", "-").split()
    for name in installed.keys() - {"pip", "setuptools", "pcae-serve"}:  # pip's own, and ours
        assert f"{name}=={installed[name]}" in pins
    assert not installed.keys() & {"torch", "onnx", "onnxscript", "pytest"}

    log = tmp_path / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["make", "serve", f"ARGS=--port 0 --cache-dir '{tmp_path}'"],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            stdout=subprocess.DEVNULL,
            stderr=stream,  # no pipe: the server would hold it open when make is killed
            text=True,
            start_new_session=True,  # make and the server end together
        )
    try:
        with ready(process, log) as url:
            sample = (folder / "docs" / "samples" / "ankle-boot.png").read_bytes()
            answer = httpx2.post(f"{url}/classify?tier=fast", content=sample).json()
            assert answer["predictions"][0]["label"] == "Ankle boot"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
