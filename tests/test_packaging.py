"""The distributions: what the wheel installs, and what the sdist can build and test."""

import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.server_process import ANY_PORT, ready

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel built from it, as `make dist` builds them."""
    folder = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Iterator[ZipFile]:
    [file] = dist.glob("*.whl")
    with ZipFile(file) as opened:
        yield opened


def read(wheel: ZipFile, name: str) -> str:
    [path] = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_top_levels_are_the_three_packages(wheel: ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"pcae_serve", "pcae_export", "pcae_training"}
    assert len(tops - packages) == 1


def test_every_source_file_is_in_the_wheel_once(wheel: ZipFile) -> None:
    for folder in ("pcae_serve", "export/pcae_export", "training/pcae_training"):
        parent = (ROOT / folder).parent
        here = {str(file.relative_to(parent)) for file in (ROOT / folder).rglob("*.py")}
        package = folder.rpartition("/")[2]
        there = [name for name in wheel.namelist() if name.startswith(f"{package}/")]
        assert here == {name for name in there if name.endswith(".py")}
        assert f"{package}/py.typed" in there


def test_the_demo_bundle_is_in_the_wheel(wheel: ZipFile) -> None:
    demo = ROOT / "pcae_serve" / "demo"
    assert (demo / "bundle.json").is_file()
    for file in filter(Path.is_file, demo.rglob("*")):
        if "__pycache__" not in file.parts:
            assert wheel.read(f"pcae_serve/demo/{file.relative_to(demo)}") == file.read_bytes()


def test_no_tests_and_no_leftovers(wheel: ZipFile) -> None:
    for name in wheel.namelist():
        parts = set(Path(name).parts)
        assert not parts & {"tests", "__pycache__", "conftest.py"}, name
        assert not Path(name).name.startswith("test_"), name


def test_commands(wheel: ZipFile) -> None:
    entry_points = ConfigParser()
    entry_points.read_string(read(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == PROJECT["scripts"]
    for target in PROJECT["scripts"].values():
        module = target.partition(":")[0].replace(".", "/")
        assert f"{module}.py" in wheel.namelist()


def test_licence_and_python(wheel: ZipFile) -> None:
    metadata = message_from_string(read(wheel, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert read(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_serving_needs_no_torch(wheel: ZipFile) -> None:
    requirements = message_from_string(read(wheel, "METADATA")).get_all("Requires-Dist", [])
    serving = [line for line in requirements if "extra ==" not in line or "'cpu'" in line]
    assert any("onnxruntime" in line for line in serving)
    assert not [line for line in serving if line.startswith(("torch", "onnx>", "onnxscript"))]


def test_metadata_is_what_an_index_accepts(dist: Path) -> None:
    files = map(str, dist.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sdist_has_what_tests_and_images_need(dist: Path) -> None:
    [file] = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("pcae_serve", "export", "training", "tests", "docker", "docs", ".github"):
        for each in filter(Path.is_file, (ROOT / folder).rglob("*")):
            if "__pycache__" not in each.parts:
                assert str(each.relative_to(ROOT)) in names
    alone = ["Makefile", "constraints.txt", "pyproject.toml", "CHANGELOG.md", "SECURITY.md"]
    assert {*alone, "README.md", "LICENSE", ".ci/run", "benchmarks/gpu.sh"} <= names


@pytest.mark.slow
def test_the_wheel_serves_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    """Needs a package index."""
    [file] = dist.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    scripts = tmp_path / "venv" / "bin"
    install = (scripts / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    subprocess.run((*install, f"{file}[cpu,client]"), check=True, timeout=1800)

    environment = {"PATH": str(scripts), "HOME": str(tmp_path)}
    log = tmp_path / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [scripts / "pcae-serve", *ANY_PORT],
            cwd=tmp_path,
            env=environment,
            stderr=stderr,
            text=True,
        )
    with ready(process, log) as url:
        sample = ROOT / "docs" / "samples" / "ankle-boot.png"
        done = subprocess.run(
            [scripts / "pcae-serve", "classify", "--url", url, sample],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert "Ankle boot" in done.stdout, done.stderr
