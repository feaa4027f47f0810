"""`make` as a newcomer meets it. pip and the pythons are fakes here, except in the slow tests."""

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

from tests.support.server_process import free_port, ready

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "make", "which", "awk", "rm", "touch", "mkdir", "cat", "chmod")


def run(
    folder: Path, *args: str, path: Path | str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """make in the folder, with nothing of the make that may have started this test."""
    make = shutil.which("make")
    assert make, "make is missing: apt-get install make"
    environment = {"PATH": str(path), "HOME": str(folder / "home"), **variables}
    return subprocess.run(
        [make, *args], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make reads, in a folder of its own with a space in its name."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with the shell's tools and no python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    return folder


def script(file: Path, body: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def fake_python(
    file: Path, version: tuple[int, int] = (3, 11), venv: bool = True, pip: str = "exit 0"
) -> None:
    """A python that knows its version, whether it has venv, and how to copy itself into one."""
    answers = f"""
case "$*" in
  *"sys.version_info <"*) exit {int(version < (3, 11))} ;;
  *"import ensurepip"*) exit {int(not venv)} ;;
  *"-venv"*) echo python{version[0]}.{version[1]}-venv ;;
  "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cat "$0" > "$4/bin/python"
    echo 'echo served "$@"' > "$4/bin/pcae-serve"; chmod +x "$4/bin/python" "$4/bin/pcae-serve" ;;
  "-m pip install "*) {pip} ;;
  *) echo "$0 $*" ;;
esac"""
    script(file, answers)


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of a run that failed."""
    assert done.returncode == 2
    [line] = (done.stdout + done.stderr).strip().splitlines()
    return line


# --- what is missing


def test_no_python_at_all(checkout: Path, path: Path) -> None:
    line = only_line(run(checkout, "serve", path=path))
    assert "python3 is missing: apt-get install python3-venv" in line


@pytest.mark.parametrize("target", ["serve", "test", "lint"])
def test_no_venv_module(checkout: Path, path: Path, target: str) -> None:
    fake_python(path / "python3", (3, 12), venv=False)
    line = only_line(run(checkout, target, path=path))
    assert "python3.12-venv is missing: apt-get install python3.12-venv" in line
    assert not list(checkout.glob(".venv*"))


def test_only_an_old_python(checkout: Path, path: Path) -> None:
    fake_python(path / "python3", (3, 10))
    line = only_line(run(checkout, "serve", path=path))
    assert "Python 3.11 or newer is missing: apt-get install python3.11-venv" in line


def test_the_named_python_is_too_old(checkout: Path, path: Path) -> None:
    fake_python(path / "python3.9", (3, 9))
    fake_python(path / "python3", (3, 12))
    line = only_line(run(checkout, "serve", "PYTHON=python3.9", path=path))
    assert "PYTHON=python3.9 is no Python 3.11 or newer" in line


# --- which python


def chosen(done: subprocess.CompletedProcess[str]) -> str:
    match = re.search(r'"(.+)" -m venv', done.stdout)
    assert match, done.stdout + done.stderr
    return match[1]


def test_the_newest_python_is_taken(checkout: Path, path: Path) -> None:
    for minor in (13, 12, 11):
        fake_python(path / f"python3.{minor}", (3, minor))
    assert chosen(run(checkout, "-n", "serve", path=path)) == str(path / "python3.13")


def test_a_python_can_be_named(checkout: Path, path: Path) -> None:
    for minor in (13, 12):
        fake_python(path / f"python3.{minor}", (3, minor))
    python = str(path / "python3.12")
    assert chosen(run(checkout, "-n", "serve", f"PYTHON={python}", path=path)) == python


def test_a_python_without_venv_is_passed_over(checkout: Path, path: Path) -> None:
    fake_python(path / "python3.13", (3, 13), venv=False)
    fake_python(path / "python3", (3, 12))
    assert chosen(run(checkout, "-n", "serve", path=path)) == str(path / "python3")


def test_a_shim_that_does_not_run_hides_nothing(checkout: Path, path: Path, tmp_path: Path) -> None:
    script(tmp_path / "shims" / "python3", "echo 'pyenv: python3: command not found' >&2; exit 127")
    fake_python(path / "python3")
    done = run(checkout, "-n", "serve", path=f"{tmp_path / 'shims'}:{path}")
    assert chosen(done) == str(path / "python3")
    assert "pyenv" not in done.stderr


# --- installing


def test_serve_installs_once_then_serves(checkout: Path, path: Path) -> None:
    fake_python(path / "python3", pip='echo "installing $PIP_CONSTRAINT" "$@"')
    first = run(checkout, "serve", "ARGS=--port 9000", path=path)
    assert first.returncode == 0, first.stderr
    assert "installing constraints.txt" in first.stdout
    assert "--editable .[cpu]" in first.stdout
    assert first.stdout.endswith("served --port 9000\n")

    assert run(checkout, "serve", path=path).stdout == "served\n"

    newer = (checkout / ".venv" / "installed").stat().st_mtime + 10
    os.utime(checkout / "pyproject.toml", (newer, newer))
    again = run(checkout, "serve", path=path)
    assert "installing" in again.stdout
    assert "-m venv" not in again.stdout  # what is there already need not be installed again


def test_a_failed_install_is_not_taken_for_done(checkout: Path, path: Path) -> None:
    fake_python(path / "python3", pip="exit 1")
    for _ in range(2):
        done = run(checkout, "serve", path=path)
        assert done.returncode == 2
        assert "served" not in done.stdout
        assert "-m venv --clear .venv" in done.stdout
    fake_python(path / "python3")
    assert run(checkout, "serve", path=path).stdout.endswith("served\n")


def test_an_interrupted_install_is_not_taken_for_done(checkout: Path, path: Path) -> None:
    fake_python(path / "python3", pip=f"kill -{signal.SIGINT.value} $PPID $$; exit 130")
    assert run(checkout, "serve", path=path).returncode != 0
    assert not (checkout / ".venv" / "installed").exists()


def test_the_server_is_given_no_torch(checkout: Path, path: Path) -> None:
    fake_python(path / "python3")
    commands = run(checkout, "-n", "serve", path=path).stdout
    assert "--editable '.[cpu]'\n" in commands
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["cpu"]]:
        assert not requirement.startswith(("torch", "onnx>", "onnxscript", "pcae-serve"))


# --- the other targets


def test_make_alone_tells_every_target(checkout: Path, path: Path) -> None:
    done = run(checkout, path=path)
    targets = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets
    assert {"serve", "test", "test-all", "lint", "format", "bench", "clean"} <= targets


def test_ci_fails_where_make_fails(checkout: Path, path: Path) -> None:
    shutil.copytree(ROOT / ".ci", checkout / ".ci")
    for tool in ("bash", "env", "dirname"):
        (path / tool).symlink_to(shutil.which(tool) or "")
    done = subprocess.run(
        [checkout / ".ci" / "run"], env={"PATH": str(path)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "python3 is missing" in done.stderr


def test_pins() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no addresses, no +cpu
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in ("cpu", "train", "export", "dev"):
        wanted += extras[extra]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in wanted} - {"pcae-serve"}
    assert names <= pins.keys()


# --- for real


@pytest.mark.slow
def test_a_real_install_serves_without_torch(tmp_path: Path) -> None:
    """With an empty HOME. Needs a package index."""
    folder = tmp_path / "fresh clone"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", ".*cache", ".venv*", "runs")
    )
    done = run(folder, "serve", "ARGS=--help", path=os.environ["PATH"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "usage" in done.stdout.lower()

    python = folder / ".venv" / "bin" / "python"
    listed = subprocess.check_output([python, "-m", "pip", "list", "--format=freeze"], text=True)
    installed = dict(line.lower().replace("_", "-").split("==") for line in listed.split())
    pins = (folder / "constraints.txt").read_text().lower().replace("_", "-").split()
    for name in installed.keys() - {"pip", "setuptools", "pcae-serve"}:  # pip's own, and ours
        assert f"{name}=={installed[name]}" in pins
    assert not installed.keys() & {"torch", "onnx", "onnxscript", "pytest"}

    assert "pip install" not in run(folder, "serve", "ARGS=--help", path=os.environ["PATH"]).stdout

    port = free_port()
    process = subprocess.Popen(
        ["make", "serve", f"ARGS=--port {port} --cache-dir '{tmp_path}'"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdout=subprocess.DEVNULL,  # no pipe: the server would hold it open when make is killed
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # make and the server end together
    )
    try:
        with ready(process, f"http://127.0.0.1:{port}") as url:
            sample = (folder / "docs" / "samples" / "ankle-boot.png").read_bytes()
            answer = httpx2.post(f"{url}/classify?tier=fast", content=sample).json()
            assert answer["predictions"][0]["label"] == "Ankle boot"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
